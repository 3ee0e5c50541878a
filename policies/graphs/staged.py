"""Prefills in fixed shapes with the stages of a reducer between the graphs.

A graph keeps what a stage remembered when it was captured. So each section of layers is a program
of its own, and between them stages run as in `ReductionHooks`, each with the memory, the budget and
the times of its stream; what they do in fixed shapes is replayed (`stream.ops.replayed`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers import DynamicCache

from stream.errors import AttachError
from stream.reducers.base import Reducer
from stream.signals import Signal

from ..prefill import Prefill, VideoSpan
from ..probes import Attention, probing
from ..query_rows import ROW_SIGNALS, QueryRows
from .buckets import TEXT_STEP, round_up
from .capture import Program
from .continuation import Continuation, rows_of
from .kept import Kept, weakly
from .replays import Replays

KEPT = 32
"""Programs of sections that are kept; the one that was not used for the longest time goes."""


@dataclass(slots=True, weakref_slot=True, eq=False)
class Prefilled:
    """The prefixes of one prefill. They lie in the decoder's own buffers, and move out when
    something else takes their place there while somebody still holds them.

    lengths: tokens that each layer holds. padding: long [b], how many of them, at the end, hold no
    token; None for none. position: long [..., b, 1], of the first token behind. last: [b, 1, d],
    what the last layer says at the last token. outside: keys and values of each section, once they
    moved.
    """

    decoder: StagedDecoder
    lengths: tuple[int, ...]
    padding: Tensor | None
    position: Tensor
    last: Tensor
    outside: list[Tensor] | None = None


class StagedDecoder(Continuation):
    """A `Continuation` that prefills what it goes on from.

    Use `resume` before the first `extend` behind a prefill. programs: of sections, by shape.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._inside: ref[Prefilled] | None = None
        self.programs: Kept[tuple[Any, ...], Program] = Kept(KEPT)
        self.choices = Replays()

    def prefill(
        self,
        stages: Sequence[Reducer],
        rows: list[list[VideoSpan]],
        embeds: Tensor,
        position: Tensor,
        length: int,
        text_from: int,
        padding: Tensor | None = None,
    ) -> tuple[Prefilled, Prefill]:
        """Prefill prompts of `length` tokens that are padded on the right.

        stages: those inside the model act where sections begin. rows: the videos of each sequence.
        embeds: [b, n, d]; position: long [..., b, n]; text_from: the place behind the last visual
        token. padding: long [b], by how many tokens each prompt is shorter than `length`.
        Returns where the prefixes are, and what became of their tokens.
        """
        self._make_room()
        n = embeds.shape[1]
        inside = {s.site.layer_index(len(self._layers)): s for s in stages if s.site.in_llm}
        if not inside.keys() <= {section.first for section in self.sections}:
            raise AttachError(
                f"Stages act at the layers {sorted(inside)}; the sections of this decoder begin at "
                f"{[section.first for section in self.sections]}."
            )
        ends = torch.full((len(rows), 1), length, device=self._device)
        if padding is not None:
            ends = ends - padding[:, None]
        prompt = torch.arange(n, device=self._device) < ends
        none = ends.new_full((1,), -1)
        last = [torch.cat([none, *(s.slots for s in spans)]).amax() for spans in rows]
        tail = round_up(n - text_from, TEXT_STEP)
        queries = QueryRows.of(prompt, torch.stack(last), tail)
        state = Prefill(rows, n, queries, padding=n - length)
        x = embeds
        with self.choices.on(self.pool):
            for stage in stages:
                if not stage.site.in_llm:
                    x = state.reduce_before(stage, x)
        entering = position if state.entered is None else _at(position, state.entered)
        state.length = x.shape[1]
        if any(Signal.INPUT_EMBEDDINGS in stage.needs for stage in inside.values()):
            state.inputs = x
        for i, section in enumerate(self.sections):
            with self.choices.on(self.pool):
                for layer in section.layers:
                    x = state.enter_layer(layer, inside.get(layer), x)
            alive = state.alive[section.first]
            here = entering if alive is None else _at(entering, alive)
            needs = inside[section.stop].needs & ROW_SIGNALS if section.stop in inside else ()
            wanted = tuple(sorted(needs))
            program = self._section_program(i, x.shape[1], wanted, tail)
            x, *seen = program(x, here, state.queries.prompt, state.queries.text)
            state.signals[section.stop] = dict(zip(wanted, seen, strict=True))
        lengths = tuple(state.lengths(len(self._layers)))
        last_row = rows_of(x, ends - 1 - (n - x.shape[1]))
        made = Prefilled(self, lengths, padding, _at(position, ends - 1) + 1, last_row)
        self._stand_behind(made)
        return made, state

    def resume(self, prefilled: Prefilled) -> None:
        """Go on from what this decoder prefilled, now or earlier; `looked` begins anew."""
        if self._inside is None or self._inside() is not prefilled:
            self._make_room()
            assert prefilled.outside is not None
            for own, moved in zip(self._buffers(prefilled), prefilled.outside, strict=True):
                own.copy_(moved)
            self._stand_behind(prefilled)
        self.rewind()
        self.looked.zero_()

    def said(self, prefilled: Prefilled) -> Tensor:
        """What `head` says at the last token of each prompt, [b, 1, ...]."""
        said: Tensor = self._head(self._model.norm(prefilled.last))
        return said

    def taken(self, prefilled: Prefilled) -> DynamicCache:
        """A cache of its own with what this decoder prefilled, now or earlier."""
        cache = DynamicCache(config=self._model.config)
        held = prefilled.outside or self._buffers(prefilled)
        copies = (own.clone().unbind(1) for own in held)
        for layer, (keys, values) in enumerate(chain.from_iterable(copies)):
            cache.update(keys, values, layer)
        return cache

    def adopt(self, cache: DynamicCache, position: Tensor, padding: Tensor | None = None) -> None:
        self._make_room()
        super().adopt(cache, position, padding)

    def _make_room(self) -> None:
        """Let what lies in the buffers move out, if somebody may still go on from it."""
        held = None if self._inside is None else self._inside()
        self._inside = None
        if held is not None and held.outside is None:
            held.outside = [own.clone() for own in self._buffers(held)]

    def _buffers(self, prefilled: Prefilled) -> list[Tensor]:
        """Where its keys and values are, or were, section by section."""
        lengths = prefilled.lengths
        return [self.cache.first(s.layers, lengths[s.first]) for s in self.sections]

    def _stand_behind(self, prefilled: Prefilled) -> None:
        """The buffers hold it now."""
        for held, section in zip(self._held, self.sections, strict=True):
            held.fill_(prefilled.lengths[section.first])
        if prefilled.padding is not None:
            self._held.sub_(prefilled.padding)
        self._position.copy_(prefilled.position)
        self.mark()
        self._inside = ref(prefilled)

    def _section_program(
        self, index: int, length: int, wanted: tuple[Signal, ...], tail: int
    ) -> Program:
        """Rows [b, length, d] through the layers of a section, and what the next stage reads.

        tail: where the text is, see `QueryRows`.
        """
        tail = tail if Signal.TEXT_ROWS in wanted else 0

        def made() -> Program:
            first, last = self.sections[index].first, self.sections[index].stop - 1
            name = f"Layers {first} to {last}, {length} tokens, batch {self._batch}"
            return Program(self.pool, name, weakly(self._run_section, index, wanted, tail))

        return self.programs.get((index, length, wanted, tail), made)

    def _run_section(
        self,
        index: int,
        wanted: tuple[Signal, ...],
        tail: int,
        x: Tensor,
        position: Tensor,
        prompt: Tensor,
        text: Tensor,
    ) -> tuple[Tensor, ...]:
        section, queries = self.sections[index], QueryRows(prompt, text, tail)
        last = self._layers[section.stop - 1].get_submodule("self_attn")
        seen: list[Tensor] = []

        def probe(attention: Attention) -> None:
            seen.extend(attention.received(*queries.behind(signal)) for signal in wanted)

        self.cache.begin()
        self._pass = None
        with self, probing(self._model, {last: probe} if wanted else {}):
            x = self._run(section, x, self._model.rotary_emb(x, position), None)
        return (x, *seen)


def _at(position: Tensor, places: Tensor) -> Tensor:
    """position long [..., b, n] at places long [b, k] -> [..., b, k]."""
    return position.gather(-1, places.expand(*position.shape[:-1], -1))
