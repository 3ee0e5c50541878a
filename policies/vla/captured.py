"""What a GPU replays of an OpenVLA-shaped network: its encoders, and actions behind a prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from ..graphs.buckets import Section
from ..graphs.capture import GraphPool, Program
from ..graphs.continuation import Continuation
from .openvla_model import OpenVLA

TEXT_STEP, WIDTH_STEP = 32, 256
"""Texts and key widths are padded to multiples of these, so that few graphs serve all lengths."""

KEPT = 8
"""Encoders, and continuations with their KV buffers, that are kept; the one that was not used for
the longest time goes."""


@dataclass(frozen=True, slots=True)
class Held:
    """What the prefixes of one batch share, and the row of one of them.

    lengths: tokens that each layer of the cache holds. whole: tokens of the unpruned prompt with
    all cameras. position: long [b, 1], of the first token behind the prefix. mask: bool [b, n] over
    the unpruned prefix, None without padding. slots, anchor: long [b, m], of the visual tokens that
    the action layers hold, their places in the sequence and in the grid of all cameras.
    """

    cache: DynamicCache
    lengths: tuple[int, ...]
    whole: int
    position: Tensor
    mask: Tensor | None
    slots: Tensor
    anchor: Tensor
    row: int


class Captured:
    """Passes of one network in fixed shapes; policies that share the network share them.

    The first pass of a shape captures it, which takes about three passes. Calls from several
    threads must not overlap.
    """

    def __init__(self, model: OpenVLA) -> None:
        self.pool = GraphPool(model.device)
        self._model = model
        self.encoder = lru_cache(KEPT)(self._encoder)
        self.behind = lru_cache(KEPT)(self._behind)

    def look(self, images: Tensor, camera: Tensor, ids: Tensor, length: Tensor) -> Any:
        """As `OpenVLA.look`."""
        ids = F.pad(ids, (0, -ids.shape[1] % TEXT_STEP))
        program = self.encoder(images.shape, images.dtype, ids.shape[1])
        tokens, relevance = program(images, camera, ids, length)
        return tokens.clone(), relevance.clone()

    def act(
        self, held: Held, sections: Sequence[Section], layers: range, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Normalised actions float32 [b, chunk, a], and what they looked at.

        sections: of the decoder, by where tokens leave it; one of them has all `layers`, whose
        attention is watched. state: normalised [b, s]. The attention is float32 [b, places], what
        each place of the sequence receives there, mean over heads, action rows and layers.
        """
        model, batch = self._model, len(state)
        first = torch.cat([model.state_row(state), model.query_rows(batch)], dim=1)
        passes = 1 if model.is_parallel else model.config.chunk * model.config.action_size
        new = first.shape[1] + passes - 1
        behind = self.behind(batch, tuple(sections), _up(held.whole + new), layers)
        widths = tuple(_up(held.lengths[section.first] + new) for section in sections)
        behind.adopt(held.cache, held.position)
        lengths = torch.full((batch,), first.shape[1], device=model.device)
        actions = behind.extend(widths, first, lengths)
        if not model.is_parallel:
            bins = [behind.token.clone()]
            for _ in range(passes - 1):
                behind.step(widths)
                bins.append(behind.token.clone())
            actions = model.from_bins(torch.cat(bins, dim=1)).view(batch, model.config.chunk, -1)
        return actions.float(), behind.looked / (passes * len(layers))

    def _encoder(self, shape: torch.Size, dtype: torch.dtype, text: int) -> Program:
        return Program(self.pool, f"The encoders of {shape[0]} pictures", self._model.look)

    def _behind(
        self, batch: int, sections: tuple[Section, ...], capacity: int, layers: range
    ) -> Continuation:
        model = self._model
        return Continuation(
            model.language_model,
            model.action_head,
            sections,
            [capacity] * len(sections),
            self.pool,
            embed=None if model.is_parallel else model.bin_rows,
            batch=batch,
            watch=layers,
            read=model.config.chunk if model.is_parallel else 1,
        )


def _up(length: int) -> int:
    return -(-length // WIDTH_STEP) * WIDTH_STEP
