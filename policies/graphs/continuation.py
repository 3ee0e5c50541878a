"""What follows a prefix in fixed shapes: more text, and tokens decoded one by one.

The layers are the model's own, in fewer kernels where their type is known (`layer`), called one
by one with explicit rotary tables, masks and a static cache. Text is padded on the right: under a
causal mask nothing real sees the padding, and what is decoded overwrites it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from stream.errors import AttachError

from ..probes import Attention, Probe, probing
from ..query_rows import QueryRows
from .attention import NAME, register
from .buckets import Section
from .cache import StaticCache, heads_of
from .capture import GraphPool, Program
from .kept import weakly
from .layer import lean, run_layers

ALIGN = 64
"""Key widths are multiples of this, as masked attention kernels want them."""

Widths = tuple[int, ...]
"""Keys that the layers of each section may look at."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What the probes must know of the pass that runs.

    queries: of a prefill. read: the last real rows, whose answers are read, long [b, r].
    """

    queries: QueryRows | None
    read: Tensor


class Continuation:
    """Goes on from the prefixes of `batch` sequences.

    Its passes set the model's attention implementation while Python runs them, which a replayed
    graph does not; inside `with continuation` it stays set, for passes that are not captured.

    head: what the last hidden states go through, the model's own head or an action head.
    embed: the input row of a decoded token, long [b, 1] -> [b, 1, d]; the model's own by default.
    sections: the layers that hold equally many tokens; capacities: how many places each has.
    watch: layers of one section whose attention from the rows that are read, mean over them, is
        summed in `looked` (float32 [batch, capacity of the section]) over all passes.
    read: how many of the last real places of a text go through `head`.
    bidirectional: the rows of a text see each other whole, as parallel action decoding wants it.

    After `extend` and every `step`, `token` (long [batch, 1]) holds the greedy next token where one
    place is read; `step` takes it as its input. All calls belong under `torch.inference_mode`.
    """

    def __init__(
        self,
        text_model: PreTrainedModel,
        head: nn.Module,
        sections: Sequence[Section],
        capacities: Sequence[int],
        pool: GraphPool,
        *,
        embed: Callable[[Tensor], Tensor] | None = None,
        batch: int = 1,
        watch: Sequence[int] = (),
        read: int = 1,
        bidirectional: bool = False,
    ) -> None:
        self._model: Any = text_model
        self._layers = cast(nn.ModuleList, text_model.layers)
        self._lean = [lean(layer) for layer in self._layers]
        self._head, self._read, self._causal = head, read, not bidirectional
        self._embed = embed or text_model.get_input_embeddings()
        self.sections, self._watch, self.pool = tuple(sections), tuple(watch), pool
        watched = {i for i, s in enumerate(self.sections) if set(s.layers) & set(watch)}
        if len(watched) > 1:
            raise AttachError(f"Layers {list(watch)} hold different tokens; watch one section.")
        weight = next(text_model.parameters())
        self._batch, self._device = batch, weight.device

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        config = text_model.config
        parameters = getattr(config, "rope_parameters", None) or {}
        axes = (3,) if "mrope_section" in parameters else ()
        seen = max((capacities[i] for i in watched), default=0)
        self.token = zeros(batch, 1)
        self.looked = zeros(batch, seen, dtype=torch.float32)
        self._position = zeros(*axes, batch, 1)
        self._held = zeros(len(self.sections), batch)
        self._mark = (self._position.clone(), self._held.clone())
        self._pass: Pass | None = None
        self._texts: dict[tuple[Widths, int], Program] = {}
        self._steps: dict[Widths, Program] = {}
        self.cache = StaticCache(
            [
                n
                for n, section in zip(capacities, self.sections, strict=True)
                for _ in section.layers
            ],
            batch,
            *heads_of(config),
            weight.dtype,
            self._device,
        )
        self._entered: list[ExitStack] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if not self._entered:
                register()
                config = self._model.config
                stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
                config._attn_implementation = NAME
                if requests := self._probes():
                    stack.enter_context(probing(self._model, requests))
            self._entered.append(stack.pop_all())
        return self

    def __exit__(self, *exc: object) -> None:
        self._entered.pop().close()

    def adopt(self, cache: DynamicCache, position: Tensor, padding: Tensor | None = None) -> None:
        """Go on from a prefix that was prefilled otherwise.

        position: long [..., batch, 1], of the first token behind it. padding: long [batch], places
        at its end, in every layer, that hold no token.
        """
        held: list[Any] = cache.layers
        lengths = [layer.keys.shape[2] for layer in held]
        for own, given in (
            (self.cache.keys, [layer.keys for layer in held]),
            (self.cache.values, [layer.values for layer in held]),
        ):
            begun = [buffer[:, :, :n] for buffer, n in zip(own, lengths, strict=True)]
            torch._foreach_copy_(begun, given)
        for row, section in zip(self._held, self.sections, strict=True):
            row.fill_(lengths[section.first])
        if padding is not None:
            self._held.sub_(padding)
        self._position.copy_(position)
        self.looked.zero_()
        self.mark()

    def extend(self, widths: Widths, embeds: Tensor, lengths: Tensor) -> Tensor:
        """Put more text behind: embeds [batch, n, d], padded; lengths long [batch].

        Each n is a program of its own, so n should take few values. Returns what `head` says at the
        last `read` real places, [batch, read, ...].
        """
        (said,) = self._text_program(widths, embeds.shape[1])(embeds, lengths)
        return said

    def step(self, widths: Widths) -> Tensor:
        """Put `token` behind everything; returns [batch, 1, ...]."""
        (said,) = self._step_program(widths)()
        return said

    def mark(self) -> None:
        """Here `rewind` comes back to."""
        self._mark[0].copy_(self._position)
        self._mark[1].copy_(self._held)

    def rewind(self) -> None:
        """Back to the mark: other text may follow it."""
        self._position.copy_(self._mark[0])
        self._held.copy_(self._mark[1])

    @property
    def _state(self) -> list[Tensor]:
        """What a pass changes in place, the cache aside."""
        return [self.token, self._position, self._held, self.looked]

    def _text_program(self, widths: Widths, n: int) -> Program:
        if (widths, n) not in self._texts:
            name = f"Text of {n} places behind {max(widths)} tokens, batch {self._batch},"
            work = weakly(self._extend, widths)
            self._texts[widths, n] = Program(self.pool, name, work, self._state)
        return self._texts[widths, n]

    def _step_program(self, widths: Widths) -> Program:
        if widths not in self._steps:
            name = f"A decode step behind {max(widths)} tokens, batch {self._batch},"
            work = weakly(self._step, widths)
            self._steps[widths] = Program(self.pool, name, work, self._state)
        return self._steps[widths]

    def _extend(self, widths: Widths, embeds: Tensor, lengths: Tensor) -> tuple[Tensor]:
        with self:
            return (self._follow(widths, embeds, lengths, self._read),)

    def _step(self, widths: Widths) -> tuple[Tensor]:
        one = torch.ones(self._batch, dtype=torch.long, device=self._device)
        with self:
            return (self._follow(widths, self._embed(self.token), one, 1),)

    def _follow(self, widths: Widths, x: Tensor, lengths: Tensor, read: int) -> Tensor:
        """New text [batch, n, d] of `lengths` real tokens behind what the cache holds."""
        new = torch.arange(x.shape[1], device=self._device)
        rotary = self._model.rotary_emb(x, self._position + new)
        places = [held[:, None] + new for held in self._held]
        spans = [i for i, section in enumerate(self.sections) for _ in section.layers]
        self.cache.append([places[i] for i in spans], [widths[i] for i in spans])
        self._pass = Pass(None, self._rows_read(lengths, read))
        for i, section in enumerate(self.sections):
            last = places[i] if self._causal else (self._held[i] + lengths - 1)[:, None]
            hidden = torch.arange(widths[i], device=self._device) > last[..., None]
            x = self._run(section, x, rotary, added_mask(hidden, x))
        self._held.add_(lengths)
        self._position.add_(lengths[:, None])
        return self._said(x, lengths, read)

    def _run(
        self, section: Section, x: Tensor, rotary: tuple[Tensor, ...], mask: Tensor | None
    ) -> Tensor:
        layers = self._lean[section.first : section.stop]
        return run_layers(layers, x, mask, rotary, self.cache, self._causal)

    def _rows_read(self, lengths: Tensor, read: int) -> Tensor:
        """The last `read` of `lengths` (long [b]) places, long [b, read]."""
        return lengths[:, None] - read + torch.arange(read, device=self._device)

    def _said(self, x: Tensor, lengths: Tensor, read: int) -> Tensor:
        """`head` at the last `read` of `lengths` places; notes the greedy token."""
        said: Tensor = self._head(self._model.norm(rows_of(x, self._rows_read(lengths, read))))
        if read == 1:
            self.token.copy_(said[:, -1].argmax(-1, keepdim=True))
        return said

    def _probes(self) -> dict[nn.Module, Probe]:
        """What the attention modules of some layers are asked for."""
        return {self._layers[i].get_submodule("self_attn"): self._watch_probe for i in self._watch}

    def _watch_probe(self, attention: Attention) -> None:
        if (now := self._pass) is not None:
            taken = torch.ones_like(now.read, dtype=torch.bool)
            seen = attention.received(now.read, taken)
            self.looked[:, : seen.shape[1]] += seen


def sections_of(cache: DynamicCache) -> list[Section]:
    """The layers between which the number of held tokens does not change."""
    held: list[Any] = cache.layers
    lengths = [layer.keys.shape[2] for layer in held]
    runs = [len(list(run)) for _, run in groupby(lengths)]
    stops = list(accumulate(runs))
    return [Section(stop - run, stop) for run, stop in zip(runs, stops, strict=True)]


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """x [b, n, d], index long [b, m] -> [b, m, d]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def added_mask(hidden: Tensor, x: Tensor) -> Tensor:
    """What is added to logits so that nobody looks at what is hidden: bool [b, n, m] ->
    [b, 1, n, m] of the type of x."""
    mask = torch.zeros(hidden.shape, dtype=x.dtype, device=x.device)
    return mask.masked_fill_(hidden, -torch.inf)[:, None]
