"""A robot policy in the three phases between which budgets are decided: encode, prefill, act."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stream.data import ActionChunk, Budget, Observation, PatchGrid
from stream.errors import AttachError
from stream.memory import Memory
from stream.plan import Plan
from stream.reducers.base import Reducer
from stream.reducers.vla_pruner import remember
from stream.signals import Signal


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """What a policy takes and gives.

    cameras: names, in the order of their tokens. grid: one grid "frame" for each camera.
    chunk: actions a call gives. execute: how many of them are meant to be executed.
    action_size, state_size: width of an action and of the proprioception.
    dt_s: control period. steps: allowed numbers of flow steps (or of decoding passes), ascending.
    """

    name: str
    cameras: tuple[str, ...]
    grid: PatchGrid
    chunk: int
    execute: int
    action_size: int
    state_size: int
    dt_s: float
    steps: tuple[int, ...] = (1,)


@dataclass(frozen=True, slots=True)
class Scene:
    """An observation after the vision encoder and the projector.

    x: [n, d] visual tokens, camera after camera; grid: one "frame" for each camera that gave a
    picture. cameras: those cameras. signals: float32 [n] each.
    """

    x: Tensor
    grid: PatchGrid
    cameras: tuple[str, ...]
    observation: Observation
    signals: dict[Signal, Tensor]


@dataclass(frozen=True, slots=True)
class Prefix:
    """A prefilled prompt that actions can be decoded from, as often as wanted.

    plan: what became of the scene's tokens, inside the model included. places: long [n], where
    those tokens stand in the grid of all cameras. tokens: how many reached the model's last layer.
    cache: the policy's own. observed_s: when its pictures were taken.
    """

    plan: Plan
    grid: PatchGrid
    cameras: tuple[str, ...]
    places: Tensor
    tokens: int
    cache: Any
    observed_s: float
    epoch: int


class VLAPolicy(ABC):
    """A policy and the reducer attached to it. Holds no state of an episode: that is in `Memory`.

    captured: what runs in fixed shapes, with the `pool` of its graphs; None if nothing does.

    Implementations run under `torch.inference_mode` and never mix episodes: `memory` and `epoch`
    belong to the caller's episode.
    """

    device: torch.device
    captured: Any = None

    @property
    @abstractmethod
    def spec(self) -> PolicySpec: ...

    def pruned_by(self, reducer: Reducer) -> VLAPolicy:
        """The same network pruned by another reducer; this policy stays as it is."""
        raise AttachError(f"{type(self).__name__} cannot be given another reducer.")

    @abstractmethod
    def encode(self, observation: Observation) -> Scene:
        """Vision encoders and projector. A camera without a picture costs and gives nothing.

        Raises ValueShapeError when no camera gave a picture.
        """

    @abstractmethod
    def prefill(self, scene: Scene, budget: Budget, memory: Memory, epoch: int = 0) -> Prefix:
        """Reduce the visual tokens to the budget and prefill prompt and instruction."""

    @abstractmethod
    def act(
        self, prefix: Prefix, observation: Observation, steps: int | None = None, seed: int = 0
    ) -> tuple[ActionChunk, Tensor]:
        """Actions from a prefix and the state of `observation`, newer or the same.

        steps: flow steps; None = the most allowed. seed: of the noise, for flow policies.

        Returns the chunk and the action attention: float32 [grid.size of the prefix], mean over
        heads, action rows, layers and flow steps, 0 where a token was pruned; read it only when
        needed, it may still be computing on the device.
        """

    def remember(self, prefix: Prefix, attention: Tensor, memory: Memory) -> None:
        """Take what the actions looked at into the episode's memory, for the next selection."""
        alive = prefix.plan.anchor
        remember(
            memory,
            attention[alive],
            prefix.places[alive],
            self.spec.grid,
            time_s=prefix.observed_s,
            epoch=prefix.epoch,
        )
