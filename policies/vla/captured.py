"""What a GPU replays of an OpenVLA-shaped network: encoders, prefill, and actions behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from stream.reducers.base import Reducer

from ..graphs.buckets import TEXT_STEP, WIDTH_STEP, Section, round_up, sections
from ..graphs.capture import Program
from ..graphs.kept import Kept
from ..graphs.staged import Prefilled, StagedDecoder
from ..graphs.standing import Standing
from ..prefill import Prefill, VideoSpan
from .openvla_model import OpenVLA
from .prompts import Prompts

ENCODERS, DECODERS = 8, 4
"""How many are kept, decoders with their KV buffers; the one that was not used for the longest time
goes."""


@dataclass(frozen=True, slots=True)
class Parts:
    """A decoder by where tokens leave it, and the layers whose action attention is read."""

    sections: tuple[Section, ...]
    watched: range

    @classmethod
    def of(cls, stages: Sequence[Reducer], depth: int, watched: range) -> Self:
        inside = [stage for stage in stages if stage.site.in_llm]
        found = sections(inside, depth)
        return cls(tuple(Section(s.first, s.stop) for s in found), watched)

    @property
    def fit(self) -> bool:
        """Whether the watched layers hold equally many tokens, as one buffer for their attention
        wants it."""
        return any(set(self.watched) <= set(section.layers) for section in self.sections)


@dataclass(frozen=True, slots=True)
class Held:
    """What the prefixes of one batch share, and the row of one of them.

    cache: a DynamicCache, or Prefilled. lengths: tokens that each layer of it holds. text: tokens
    of the longest text. position: long [b, 1], of the first token behind the prefix. mask: bool
    [b, n] over the unpruned prefix, None without padding. slots, anchor: long [b, m], of the visual
    tokens that the action layers hold, their places in the sequence and in the grid of all cameras.
    """

    cache: Any
    lengths: tuple[int, ...]
    text: int
    position: Tensor
    mask: Tensor | None
    slots: Tensor
    anchor: Tensor
    row: int

    def stock(self) -> Held:
        """The same for passes that nothing captured."""
        if isinstance(self.cache, Prefilled):
            return replace(self, cache=self.cache.decoder.taken(self.cache))
        return self


class CapturedOpenVLA(Standing):
    """Passes of one network in fixed shapes; policies that share the network share them.

    The first pass of a shape captures it, which takes about three passes. A call that overlaps
    another, of any of these policies, is refused with AttachError. Ask `ready` before each call.
    """

    def __init__(self, model: OpenVLA) -> None:
        super().__init__(type(model).__name__, lambda: (model,), model.device)
        self._model = model
        self._passes = 1 if model.is_parallel else model.config.chunk * model.config.action_size
        self._first = model.state_rows + len(model.queries.weight)
        self.encoders: Kept[tuple[Any, ...], Program] = Kept(ENCODERS)
        self.decoders: Kept[tuple[int, Parts, int], StagedDecoder] = Kept(DECODERS)
        self.stand()

    def _rebuild(self) -> None:
        self._look = partial(self._model.look, encoders=self._model.lean_encoders())

    def _kept(self) -> list[Kept[Any, Any]]:
        inside = [decoder.programs for decoder in self.decoders.values()]
        return [self.encoders, self.decoders, *inside]

    def look(self, images: Tensor, camera: Tensor, ids: Tensor, length: Tensor) -> Any:
        """As `OpenVLA.look`."""
        ids = F.pad(ids, (0, -ids.shape[1] % TEXT_STEP))
        with self._alone:
            program = self._encoder(images.shape, images.dtype, ids.shape[1])
            tokens, relevance = program(images, camera, ids, length)
            return tokens.clone(), relevance.clone()

    def prefill(
        self,
        reducer: Reducer,
        parts: Parts,
        spans: Sequence[VideoSpan],
        prompts: Prompts,
    ) -> tuple[Prefilled, Prefill]:
        """Prefill prompts without padding, and what became of their tokens.

        spans: the visual tokens of each prompt.
        """
        position, text = prompts.position, prompts.text
        length, padding = position.shape[1], -text % TEXT_STEP
        more = torch.arange(1, padding + 1, device=position.device)
        with self._alone:
            return self._decoder(len(position), parts, text).prefill(
                reducer.stages,
                [[span] for span in spans],
                F.pad(prompts.rows, (0, 0, 0, padding)),
                torch.cat([position, position[:, -1:] + more], dim=1),
                length,
                text_from=length - text + 1,
            )

    def act(self, held: Held, parts: Parts, state: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised actions float32 [b, chunk, a], and what they looked at.

        state: normalised [b, s]. The attention is float32 [b, places], what each place of the
        sequence receives in the watched layers, mean over heads, action rows and layers.
        """
        with self._alone:
            return self._act(held, parts, state)

    def _act(self, held: Held, parts: Parts, state: Tensor) -> tuple[Tensor, Tensor]:
        model, batch = self._model, len(state)
        if isinstance(held.cache, Prefilled) and held.cache.decoder.pool is self.pool:
            behind = held.cache.decoder
            behind.resume(held.cache)
        else:  # prefilled as it stands, or by what stood on an older state of the network
            behind = self._decoder(batch, parts, held.text)
            behind.adopt(held.stock().cache, held.position)
        new = self._first + self._passes - 1
        widths = tuple(
            round_up(held.lengths[section.first] + new, WIDTH_STEP) for section in parts.sections
        )
        first = torch.cat([model.state_row(state), model.query_rows(batch)], dim=1)
        lengths = torch.full((batch,), self._first, device=model.device)
        actions = behind.extend(widths, first, lengths)
        if not model.is_parallel:
            bins = [behind.token.clone()]
            for _ in range(self._passes - 1):
                behind.step(widths)
                bins.append(behind.token.clone())
            actions = model.from_bins(torch.cat(bins, dim=1)).view(batch, model.config.chunk, -1)
        return actions.float(), behind.looked / (self._passes * len(parts.watched))

    def _encoder(self, shape: torch.Size, dtype: torch.dtype, text: int) -> Program:
        name = f"The encoders of {shape[0]} pictures"
        return self.encoders.get((shape, dtype, text), lambda: Program(self.pool, name, self._look))

    def _decoder(self, batch: int, parts: Parts, text: int) -> StagedDecoder:
        """With room for prompts of so much text with all cameras, and for what follows them."""
        before = round_up(text, TEXT_STEP) + self._model.visual_tokens
        capacity = round_up(before + self._first + self._passes - 1, WIDTH_STEP)
        return self.decoders.get(
            (batch, parts, capacity), lambda: self._made(batch, parts, capacity)
        )

    def _made(self, batch: int, parts: Parts, capacity: int) -> StagedDecoder:
        model = self._model
        made = StagedDecoder(
            model.language_model,
            model.action_head,
            parts.sections,
            [capacity] * len(parts.sections),
            self.pool,
            embed=None if model.is_parallel else model.bin_rows,
            batch=batch,
            watch=parts.watched,
            read=model.config.chunk if model.is_parallel else 1,
        )
        self._footing.note()  # weights may have moved together
        return made
