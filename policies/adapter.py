"""What foveate must know about a video LLM, and nothing more."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stream.data import Frame, PatchGrid
from stream.errors import AttachError
from stream.reducers.base import Reducer
from stream.signals import Signal

from .fit import check_fit, misfit
from .hooks import INSIDE
from .probes import Attention, probing
from .vision.lean import Encoder, Lean

Features = Callable[[dict[str, Any]], tuple[Tensor, PatchGrid]]
"""As `VideoAdapter.features`."""


@dataclass(frozen=True, slots=True)
class VideoPlace:
    """Where a video's tokens stand in a sequence: slots long [n], its grid, frame times."""

    slots: Tensor
    grid: PatchGrid
    pts_s: tuple[float, ...]


class SaliencyTap:
    """Collects the attention each patch receives in the last vision layer, as the model runs."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def add(self, scores: Tensor) -> None:
        """scores: float32 [images, patches]."""
        self._parts.append(scores)

    def take(self) -> Tensor:
        """All scores since the last call, [images, patches] or flat where shapes differ."""
        parts, self._parts = self._parts, []
        if not parts:
            raise AttachError("The vision encoder has not run since saliency was last read.")
        if len({p.shape[1] for p in parts}) == 1:
            return torch.cat(parts)
        return torch.cat([p.reshape(-1) for p in parts])

    def clear(self) -> None:
        self._parts.clear()


class VideoAdapter(ABC):
    """One family of video LLMs in transformers' implementation."""

    provides: ClassVar[frozenset[Signal]] = frozenset({Signal.SALIENCY})
    """Signals before the language model."""

    provides_inside: ClassVar[frozenset[Signal]] = INSIDE
    """Signals inside it."""

    encoder_waits: ClassVar[bool] = True
    """Whether the encoder asks the device for values, so that no graph can hold it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model

    @property
    def text_model(self) -> PreTrainedModel:
        model: PreTrainedModel = self.model.model.language_model
        return model

    @property
    def layers(self) -> nn.ModuleList:
        layers: nn.ModuleList = self.model.model.language_model.layers
        return layers

    @property
    @abstractmethod
    def vision_model(self) -> PreTrainedModel:
        """The vision encoder."""

    @property
    @abstractmethod
    def saliency_layer(self) -> nn.Module:
        """The attention module of the vision layer whose output the model uses."""

    @abstractmethod
    def pooled_saliency(self, scores: Tensor, grids: Sequence[PatchGrid]) -> list[Tensor]:
        """Raw column means of one vision pass -> float32 [grid.size] for each video."""

    @abstractmethod
    def places(self, inputs: dict[str, Any]) -> list[list[VideoPlace]]:
        """The videos of each sequence, from the keyword arguments of the model's forward."""

    @abstractmethod
    def pixel_inputs(self, frames: Sequence[Frame], processor: Any) -> dict[str, Any]:
        """Frames -> the pixel arguments of `features`, as the model's own processor makes them on
        the model's device."""

    @abstractmethod
    def features(self, pixels: dict[str, Any]) -> tuple[Tensor, PatchGrid]:
        """Projected and pooled features [n, d] of one video in (t, y, x) order, and their grid."""

    def encoded(
        self, pixels: dict[str, Any], saliency: bool, features: Features | None = None
    ) -> tuple[Tensor, PatchGrid, dict[Signal, Tensor]]:
        """Features, and the pooled saliency if asked for. features: what gives them."""
        features = features or self.features
        if not saliency:
            return *features(pixels), {}
        tap = SaliencyTap()
        with self.saliency(tap):
            x, grid = features(pixels)
        return x, grid, {Signal.SALIENCY: self.pooled_saliency(tap.take(), [grid])[0]}

    def in_fewer_kernels(self) -> Features:
        """`features` in fewer kernels, from the weights that lie there now; itself where that
        cannot be."""
        return self.features

    def stock_features(self, pixels: dict[str, Any]) -> tuple[Tensor, PatchGrid]:
        """`features` as transformers computes them: the same values, perhaps later."""
        return self.features(pixels)

    def lean(self, encoder: Encoder) -> Lean | None:
        """What runs in place of the vision tower; None for `exact`, which every family has."""
        if encoder == "exact":
            return None
        raise AttachError(
            f"The encoder of {type(self.model).__name__} runs exact only; '{encoder}' is for "
            "families with a SigLIP tower, such as LLaVA-OneVision."
        )

    def lean_features(
        self, lean: Lean, pixels: dict[str, Any], saliency: bool
    ) -> tuple[Tensor, PatchGrid, dict[Signal, Tensor]]:
        """What `encoded` gives, from the tower `lean`."""
        raise NotImplementedError

    @abstractmethod
    def placeholder(self) -> int:
        """Token id that stands for visual tokens in a prompt."""

    @abstractmethod
    def trailing(self) -> Tensor | None:
        """Embeddings [m, d] that follow a video's tokens (a newline), if the family has any."""

    @abstractmethod
    def positions(self, input_ids: Tensor, mask: Tensor, grid: PatchGrid) -> Tensor:
        """Position ids of an unpruned prompt, [..., b, n]. input_ids, mask: [b, n]."""

    def frames_per_token(self) -> int:
        """Consecutive frames that one row of the patch grid covers."""
        return 1

    @classmethod
    def fits(cls, reducer: Reducer) -> bool:
        """Whether models of this family give all that a reducer needs."""
        return not misfit(reducer, cls.provides, cls.provides_inside)

    def check_fit(self, reducer: Reducer) -> None:
        """Raise AttachError if a stage needs a signal that this model does not give there."""
        check_fit(type(self.model).__name__, reducer, self.provides, self.provides_inside)

    def saliency(self, tap: SaliencyTap) -> AbstractContextManager[None]:
        """While active, the vision encoder's received attention flows into `tap`."""

        def probe(attention: Attention) -> None:
            tap.add(attention.received_from_all())

        return probing(self.vision_model, {self.saliency_layer: probe})


def supported() -> tuple[str, ...]:
    """Model types that have an adapter."""
    families = importlib.import_module("policies.video").__path__
    return tuple(sorted(m.name for m in pkgutil.iter_modules(families) if not m.ispkg))


def adapter_for(model: PreTrainedModel) -> VideoAdapter:
    """The adapter of a model's family; AttachError names the supported ones."""
    kind = str(model.config.model_type)
    if kind not in supported():
        raise AttachError(
            f"No adapter for model type '{kind}' ({type(model).__name__}). "
            f"Supported: {', '.join(supported())}."
        )
    module = importlib.import_module(f"policies.video.{kind}")
    adapter: VideoAdapter = module.Adapter(model)
    return adapter
