"""A decoder model in fixed shapes: prefill, more text behind it, and decode steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stream.data import Budget, VisualTokens
from stream.errors import AttachError
from stream.memory import Memory
from stream.reducers.base import Reducer, reduce_stage
from stream.signals import Signal, Signals

from ..probes import Attention, Probe
from ..query_rows import ROW_SIGNALS, QueryRows
from .buckets import Bucket, Section, round_up, sections, visual_tokens
from .capture import GraphPool, Program
from .continuation import ALIGN, Continuation, Pass, Widths, rows_of
from .kept import weakly


@dataclass(slots=True)
class _Shape:
    """A bucket worked out for one model: visual tokens and key widths by section, its prefill."""

    visual: tuple[int, ...]
    widths: Widths
    prefill: Program


class StaticDecoder(Continuation):
    """Runs the text model of `batch` requests of one bucket at a time.

    Prompts are padded on the right, as texts behind them are. What a `Continuation` is given holds
    here too; `extend` and `step` take the `widths` of a bucket.

    stages: reducers that act inside the model.
    bidirectional: the prompt sees itself whole too, and must fill its bucket.
    keeps: whether the prompt stays in the cache, for what follows it.
    memory: what the stages remember of each request; a captured graph keeps what it first gave.

    After `prefill`, `anchor` (long [batch, visual]) holds the places in the grid of the visual
    tokens that are left in the last section; `looked` begins anew.
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
        keeps: bool = True,
        memory: Callable[[], Memory] = Memory,
    ) -> None:
        parts = sections(stages, int(text_model.config.num_hidden_layers))
        shapes = {bucket: _visual_and_widths(bucket, parts) for bucket in buckets}
        super().__init__(
            text_model,
            head,
            parts,
            [max(widths) for widths in zip(*(w for _, w in shapes.values()), strict=True)],
            pool,
            batch=batch,
            watch=watch,
            read=read,
            bidirectional=bidirectional,
        )
        self._memory, self.cache.keeps = memory, keeps
        self.anchor = self.token.new_zeros(batch, max(b.visual for b in buckets))
        self._signals: dict[int, dict[Signal, Tensor]] = {}
        self._shapes = {
            bucket: _Shape(visual, widths, self._prefill_program(bucket))
            for bucket, (visual, widths) in shapes.items()
        }

    def prefill(
        self, bucket: Bucket, embeds: Tensor, position_ids: Tensor, lengths: Tensor, anchor: Tensor
    ) -> Tensor:
        """What `head` says at the last `read` real places, [batch, read, ...].

        embeds: [batch, bucket.length, d], padded on the right; position_ids: long [..., batch,
        length]; lengths: long [batch], real tokens; anchor: long [batch, bucket.visual], place of
        each visual token in the grid.
        """
        (said,) = self._shape_of(bucket).prefill(embeds, position_ids, lengths, anchor)
        self.mark()
        return said

    def widths(self, bucket: Bucket) -> Widths:
        """Of what follows a prefill."""
        return self._shape_of(bucket).widths

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

    def _prefill_program(self, bucket: Bucket) -> Program:
        name = f"The prefill of {bucket.visual} visual tokens, batch {self._batch},"
        work = weakly(self._run_prefill, bucket)
        return Program(self.pool, name, work, [*self._state, self.anchor])

    def _run_prefill(self, bucket: Bucket, *values: Tensor) -> tuple[Tensor]:
        with self:
            return (self._prefill(bucket, *values),)

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
                entered, queries = rows_of(entered, kept), queries.at(kept)
                index = kept[..., None]
                rotary = tuple(
                    torch.take_along_dim(t, index.view((1,) * (t.ndim - 3) + index.shape), dim=-2)
                    for t in rotary
                )
            self._pass = Pass(queries, self._rows_read(lengths, self._read))
            x = self._run(section, x, rotary, None)
            held.append(lengths)
        self._held.copy_(torch.stack(held))
        self.anchor[:, : anchor.shape[1]] = anchor
        return self._said(x, lengths, self._read)

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
        asked: dict[nn.Module, list[Probe]] = {m: [p] for m, p in super()._probes().items()}
        for section in self.sections[1:]:
            assert section.reducer is not None
            if needs := section.reducer.needs & ROW_SIGNALS:
                attention = self._layers[section.first - 1].get_submodule("self_attn")
                asked.setdefault(attention, []).append(self._signal_probe(section.first, needs))

        def joined(probes: list[Probe]) -> Probe:
            def probe(attention: Attention) -> None:
                for one in probes:
                    one(attention)

            return probe

        return {module: joined(probes) for module, probes in asked.items()}

    def _signal_probe(self, layer: int, needs: frozenset[Signal]) -> Probe:
        def probe(attention: Attention) -> None:
            if self._pass is not None and (queries := self._pass.queries) is not None:
                self._signals[layer] = {
                    signal: attention.received(*queries.behind(signal)) for signal in needs
                }

        return probe


def _visual_and_widths(bucket: Bucket, parts: Sequence[Section]) -> tuple[tuple[int, ...], Widths]:
    """Visual tokens, and keys that may be looked at, by section."""
    visual = visual_tokens(parts, bucket.visual, Budget(bucket.budget))
    rest = bucket.before + bucket.after + bucket.new
    return tuple(visual), tuple(round_up(n + rest, ALIGN) for n in visual)
