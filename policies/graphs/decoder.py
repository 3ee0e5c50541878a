"""A decoder model in fixed shapes: prefill, more text behind a prefix, and decode steps.

The layers are the model's own, in fewer kernels where their type is known (`layer`), called one
by one with explicit rotary tables, masks and a static cache. Text behind the video is padded on the
right: under a causal mask nothing real sees the padding, and what is decoded overwrites it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stream.data import Budget, VisualTokens
from stream.errors import AttachError
from stream.memory import Memory
from stream.reducers.base import Reducer, reduce_stage
from stream.signals import Signal, Signals

from ..probes import Attention, Probe, probing
from ..query_rows import ROW_SIGNALS, QueryRows
from .attention import NAME, register
from .buckets import Bucket, Section, sections
from .cache import StaticCache
from .capture import GraphPool, Program
from .layer import lean

ALIGN = 64
"""Key widths are multiples of this, as masked attention kernels want them."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """What the probes must know of the pass that runs.

    start, visual: first visual place, and visual tokens by now. queries: of a prefill. last: the
    last real row of the pass, long [b, 1].
    """

    start: int
    visual: int
    queries: QueryRows | None
    last: Tensor


@dataclass(slots=True)
class _Shape:
    """A bucket worked out for one model: visual tokens and key widths by section, its programs."""

    visual: tuple[int, ...]
    widths: tuple[int, ...]
    prefill: Program
    extend: Program
    step: Program


class StaticDecoder:
    """Runs the text model of `batch` requests of one bucket at a time; a context manager.

    head: what the last hidden states go through, the model's own head or an action head.
    stages: reducers that act inside the model. watch: layers of one section whose attention from
        each prompt's last row and each decoded token to the visual tokens is summed in `looked`
        (float32 [batch, visual]); `anchor` (long, alike) holds the places of those tokens.
    read: how many of the last real places go through `head`.
    bidirectional: the prompt sees itself whole, as parallel action decoding wants it.
    memory: what the stages remember of each request; a captured graph keeps what it first gave.

    After `prefill`, `extend` and every `step`, `token` (long [batch, 1]) holds the greedy next
    token, which `step` takes as its input. All calls belong under `torch.inference_mode`.
    """

    def __init__(
        self,
        text_model: PreTrainedModel,
        head: nn.Module,
        buckets: Sequence[Bucket],
        pool: GraphPool,
        *,
        batch: int = 1,
        stages: Sequence[Reducer] = (),
        watch: Sequence[int] = (),
        read: int = 1,
        bidirectional: bool = False,
        memory: Callable[[], Memory] = Memory,
    ) -> None:
        self._model: Any = text_model
        self._layers = cast(nn.ModuleList, text_model.layers)
        self._lean = [lean(layer) for layer in self._layers]
        self._head, self._read, self._causal = head, read, not bidirectional
        self.sections = sections(stages, len(self._layers))
        self._watch, self._memory = tuple(watch), memory
        watched = {next(s for s in self.sections if i in s.layers) for i in self._watch}
        if len(watched) > 1:
            raise AttachError(f"Layers {list(watch)} hold different tokens; watch one section.")
        weight = next(text_model.parameters())
        self._batch, self._device = batch, weight.device

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        config = text_model.config
        parameters = getattr(config, "rope_parameters", None) or {}
        axes = (3,) if "mrope_section" in parameters else ()
        visual = max(b.visual for b in buckets)
        self.token = zeros(batch, 1)
        self.looked = zeros(batch, visual, dtype=torch.float32)
        self.anchor = zeros(batch, visual)
        self._position = zeros(*axes, batch, 1)
        self._held = zeros(len(self.sections), batch)
        self._mark = (self._position.clone(), self._held.clone())
        self._pass: _Pass | None = None
        self._signals: dict[int, dict[Signal, Tensor]] = {}
        self._shapes = {bucket: self._shape(bucket, pool) for bucket in buckets}
        capacities = [
            max(shape.widths[i] for shape in self._shapes.values())
            for i, section in enumerate(self.sections)
            for _ in section.layers
        ]
        heads = int(config.num_attention_heads)
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.cache = StaticCache(
            capacities,
            batch,
            int(config.num_key_value_heads),
            int(head_size),
            weight.dtype,
            self._device,
        )
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        register()
        before = str(self._model.config._attn_implementation)
        with ExitStack() as stack:
            self._model.set_attn_implementation(NAME)
            stack.callback(self._model.set_attn_implementation, before)
            requests = self._probes()
            if requests:
                stack.enter_context(probing(self._model, requests))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def prefill(
        self, bucket: Bucket, embeds: Tensor, position_ids: Tensor, lengths: Tensor, anchor: Tensor
    ) -> Tensor:
        """What `head` says at the last `read` real places, [batch, read, ...].

        embeds: [batch, bucket.length, d], padded on the right; position_ids: long [..., batch,
        length]; lengths: long [batch], real tokens; anchor: long [batch, bucket.visual], place of
        each visual token in the grid.
        """
        (said,) = self._shape_of(bucket).prefill(embeds, position_ids, lengths, anchor)
        self._mark[0].copy_(self._position)
        self._mark[1].copy_(self._held)
        return said

    def extend(self, bucket: Bucket, embeds: Tensor, lengths: Tensor) -> Tensor:
        """Put more text behind the prefix: embeds [batch, n, d], padded; lengths long [batch].

        The texts of a bucket must always come in the same n. Returns what `prefill` returns.
        """
        (said,) = self._shape_of(bucket).extend(embeds, lengths)
        return said

    def step(self, bucket: Bucket) -> Tensor:
        """Put `token` behind everything; returns [batch, 1, ...]."""
        (said,) = self._shape_of(bucket).step()
        return said

    def rewind(self) -> None:
        """Back to the end of the last prefill: other text may follow it."""
        self._position.copy_(self._mark[0])
        self._held.copy_(self._mark[1])

    def visual_tokens(self, bucket: Bucket) -> list[int]:
        """Visual tokens that enter each decoder layer."""
        counts = zip(self._shape_of(bucket).visual, self.sections, strict=True)
        return [n for n, section in counts for _ in section.layers]

    def _shape_of(self, bucket: Bucket) -> _Shape:
        if bucket not in self._shapes:
            raise AttachError(
                f"{bucket} was not announced; known buckets hold "
                f"{sorted(b.visual for b in self._shapes)} visual tokens."
            )
        return self._shapes[bucket]

    def _shape(self, bucket: Bucket, pool: GraphPool) -> _Shape:
        visual = [bucket.visual]
        for section in self.sections[1:]:
            assert section.reducer is not None
            visual.append(section.reducer.keeps(visual[-1], Budget(bucket.budget)))
        rest = bucket.before + bucket.after + bucket.new
        widths = tuple(-(-(n + rest) // ALIGN) * ALIGN for n in visual)
        state = (self.token, self._position, self._held, self.looked, self.anchor)
        name = f"{bucket.visual} visual tokens, batch {self._batch}"

        def prefill(*values: Tensor) -> tuple[Tensor]:
            return (self._prefill(bucket, *values),)

        def extend(embeds: Tensor, lengths: Tensor) -> tuple[Tensor]:
            return (self._follow(bucket, embeds, lengths, self._read),)

        def step() -> tuple[Tensor]:
            embeds = self._model.get_input_embeddings()(self.token)
            one = torch.ones(self._batch, dtype=torch.long, device=self._device)
            return (self._follow(bucket, embeds, one, 1),)

        return _Shape(
            tuple(visual),
            widths,
            Program(pool, f"The prefill of {name},", prefill, state),
            Program(pool, f"Text behind {name},", extend, state),
            Program(pool, f"A decode step behind {name},", step, state),
        )

    def _prefill(
        self, bucket: Bucket, x: Tensor, position_ids: Tensor, lengths: Tensor, anchor: Tensor
    ) -> Tensor:
        ids = position_ids[1:] if position_ids.shape[:-2] == (4,) else position_ids
        end = (lengths - 1)[:, None].expand(*ids.shape[:-1], 1)
        self._position.copy_(ids.gather(-1, end) + 1)
        self.looked.zero_()
        self.cache.begin()
        entered, rotary, held = x, self._model.rotary_emb(x, ids), []
        place = torch.arange(bucket.length, device=self._device)
        prompt = place < lengths[:, None] - (0 if self._causal else self._read)
        last_visual = torch.full_like(lengths, bucket.before + bucket.visual - 1)
        queries = QueryRows.of(prompt, last_visual, bucket.after)
        for section in self.sections:
            if section.reducer is not None:
                x, kept, anchor = self._reduce(section, bucket, x, entered, anchor)
                lengths = lengths - (entered.shape[1] - kept.shape[1])
                entered, queries = _rows(entered, kept), queries.at(kept)
                index = kept[..., None]
                rotary = tuple(
                    torch.take_along_dim(t, index.view((1,) * (t.ndim - 3) + index.shape), dim=-2)
                    for t in rotary
                )
            last = (lengths - 1)[:, None]
            self._pass = _Pass(bucket.before, anchor.shape[1], queries, last)
            mask = None if self._causal else _padding_mask(x, lengths)
            x = self._run(section, x, rotary, mask)
            held.append(lengths)
        self._held.copy_(torch.stack(held))
        self.anchor[:, : anchor.shape[1]] = anchor
        return self._said(x, lengths, self._read)

    def _follow(self, bucket: Bucket, x: Tensor, lengths: Tensor, read: int) -> Tensor:
        """New text [batch, n, d] of `lengths` real tokens behind what the cache holds."""
        shape = self._shapes[bucket]
        new = torch.arange(x.shape[1], device=self._device)
        rotary = self._model.rotary_emb(x, self._position + new)
        places = [held[:, None] + new for held in self._held]
        spans = [i for i, section in enumerate(self.sections) for _ in section.layers]
        self.cache.append([places[i] for i in spans], [shape.widths[i] for i in spans])
        for i, section in enumerate(self.sections):
            hidden = torch.arange(shape.widths[i], device=self._device) > places[i][..., None]
            mask = torch.zeros(hidden.shape, dtype=x.dtype, device=self._device)
            mask = mask.masked_fill_(hidden, -torch.inf)[:, None]
            last = (lengths - 1)[:, None]
            self._pass = _Pass(bucket.before, shape.visual[i], None, last)
            x = self._run(section, x, rotary, mask)
        self._held.add_(lengths)
        self._position.add_(lengths[:, None])
        return self._said(x, lengths, read)

    def _run(
        self, section: Section, x: Tensor, rotary: tuple[Tensor, ...], mask: Tensor | None
    ) -> Tensor:
        for index in section.layers:
            x = self._lean[index](
                x,
                attention_mask=mask,
                position_embeddings=rotary,
                past_key_values=self.cache,
                use_cache=True,
            )
        return x

    def _said(self, x: Tensor, lengths: Tensor, read: int) -> Tensor:
        """`head` at the last `read` of `lengths` places; notes the greedy token."""
        index = lengths[:, None] - read + torch.arange(read, device=self._device)
        said: Tensor = self._head(self._model.norm(_rows(x, index)))
        if read == 1:
            self.token.copy_(said[:, -1].argmax(-1, keepdim=True))
        return said

    def _reduce(
        self, section: Section, bucket: Bucket, x: Tensor, entered: Tensor, anchor: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(what is left [b, m, d], its places among the rows of x long [b, m], visual anchors)."""
        reducer = section.reducer
        assert reducer is not None
        start, stop = bucket.before, bucket.before + anchor.shape[1]
        times = (0.0,) * bucket.grid.frames
        signals = self._signals.pop(section.first, {}) | {Signal.INPUT_EMBEDDINGS: entered}
        places = torch.arange(x.shape[1], device=x.device)
        left, kept, anchors = [], [], []
        for i in range(x.shape[0]):
            tokens = VisualTokens(x[i, start:stop], anchor[i], bucket.grid, times)
            given = {signal: value[i, start:stop] for signal, value in signals.items()}
            budget = Budget(bucket.budget)
            plan = reduce_stage(reducer, tokens, Signals(given), budget, self._memory())
            left.append(torch.cat([x[i, :start], plan.apply(tokens.x), x[i, stop:]]))
            kept.append(torch.cat([places[:start], start + plan.anchor, places[stop:]]))
            anchors.append(anchor[i][plan.anchor])
        return torch.stack(left), torch.stack(kept), torch.stack(anchors)

    def _probes(self) -> dict[nn.Module, Probe]:
        """What the attention modules of some layers are asked for."""
        asked: dict[int, list[Probe]] = {}
        for section in self.sections[1:]:
            assert section.reducer is not None
            if needs := section.reducer.needs & ROW_SIGNALS:
                probe = self._signal_probe(section.first, needs)
                asked.setdefault(section.first - 1, []).append(probe)
        for layer in self._watch:
            asked.setdefault(layer, []).append(self._watch_probe)

        def joined(probes: list[Probe]) -> Probe:
            def probe(attention: Attention) -> None:
                for one in probes:
                    one(attention)

            return probe

        return {
            self._layers[i].get_submodule("self_attn"): joined(probes)
            for i, probes in asked.items()
        }

    def _signal_probe(self, layer: int, needs: frozenset[Signal]) -> Probe:
        def probe(attention: Attention) -> None:
            if self._pass is not None and (queries := self._pass.queries) is not None:
                self._signals[layer] = {
                    signal: attention.received(*queries.behind(signal)) for signal in needs
                }

        return probe

    def _watch_probe(self, attention: Attention) -> None:
        if (now := self._pass) is not None:
            seen = attention.received(now.last, torch.ones_like(now.last, dtype=torch.bool))
            self.looked[:, : now.visual] += seen[:, now.start : now.start + now.visual]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x [b, n, d], index long [b, m] -> [b, m, d]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def _padding_mask(x: Tensor, lengths: Tensor) -> Tensor:
    """Added mask [b, 1, n, n] under which all places see all real ones."""
    hidden = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
    mask = torch.zeros(hidden.shape, dtype=x.dtype, device=x.device)
    return mask.masked_fill_(hidden, -torch.inf)[:, None, None].expand(-1, 1, x.shape[1], -1)
