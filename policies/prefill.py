"""The state of one prefill: where its videos stand, what is alive at each layer, what was seen."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from stream.data import Budget, PatchGrid, VisualTokens
from stream.errors import AttachError
from stream.memory import Memory
from stream.plan import Plan
from stream.reducers.base import Reducer, reduce_batch
from stream.signals import Signal, Signals

from .query_rows import QueryRows


@dataclass(frozen=True, slots=True)
class VideoSpan:
    """The visual tokens of one video inside one sequence.

    slots: long [n], their places in the sequence; plan: what became of the video's tokens so far.
    signals: what is known of the video's unreduced tokens, for stages before the model.
    """

    slots: Tensor
    grid: PatchGrid
    pts_s: tuple[float, ...]
    budget: Budget
    plan: Plan
    signals: Signals
    memory: Memory = field(default_factory=Memory)

    def entering(
        self, reducer: Reducer, x: Tensor, inside: dict[Signal, Tensor]
    ) -> tuple[VisualTokens, Signals]:
        """What a stage is given of this video's rows of x [t, d]; signals `inside` are [t, ...]."""
        tokens = VisualTokens(x[self.slots], self.plan.anchor, self.grid, self.pts_s)
        if not reducer.site.in_llm:
            return tokens, self.signals
        return tokens, Signals({signal: value[self.slots] for signal, value in inside.items()})


@dataclass(slots=True)
class Prefill:
    """One prefill and the decode steps that follow it.

    rows: the videos of each sequence of the batch. full_length: places of a sequence before
    anything left. queries, inputs: rows that count as the prompt's, and what entered the model
    ([b, n, d], only if a stage asks for it), of what is alive now. entered: long [b, n0], original
    places of what entered layer 0, None while nothing left; length: how many; later: tokens seen
    since. alive: at a layer and after, indices into layer 0's sequence, long [b, n]; None while
    everything is alive. signals: by layer, for its stage. history: what `rows` was from a layer on.
    shift: added to decode positions. padding: places behind every prompt, in fixed shapes.
    """

    rows: list[list[VideoSpan]]
    full_length: int
    queries: QueryRows
    inputs: Tensor | None = None
    entered: Tensor | None = None
    length: int = 0
    later: int = 0
    alive: dict[int, Tensor | None] = field(default_factory=dict)
    signals: dict[int, dict[Signal, Tensor]] = field(default_factory=dict)
    history: dict[int, list[list[VideoSpan]]] = field(default_factory=dict)
    shift: Tensor | None = None
    padding: int = 0
    running: bool = True

    def reduce_before(self, reducer: Reducer, embeds: Tensor) -> Tensor:
        """Run a stage that stands before the model: embeds [b, n, d] -> [b, k, d]."""
        embeds, kept = self._reduce(reducer, embeds, {})
        self.entered = kept if self.entered is None else self.entered.gather(1, kept)
        return embeds

    def enter_layer(self, layer: int, reducer: Reducer | None, hidden: Tensor) -> Tensor:
        """Run the stage of a layer, if any, and note what is alive from here on."""
        alive = self.alive.get(layer - 1)
        if reducer is not None:
            self.history.setdefault(0, self.rows)
            before = hidden.shape[1]
            hidden, kept = self._reduce(reducer, hidden, self.signals.pop(layer, {}))
            if hidden.shape[1] < before:
                alive = kept if alive is None else alive.gather(1, kept)
            self.history[layer] = self.rows
        self.alive[layer] = alive
        return hidden

    def rows_at(self, layer: int) -> list[list[VideoSpan]]:
        """The videos of each sequence as they entered a layer."""
        first = max((at for at in self.history if at <= layer), default=None)
        return self.rows if first is None else self.history[first]

    def lengths(self, depth: int) -> list[int]:
        """Tokens (text included) that entered each of `depth` layers."""
        lengths, now = [], self.length
        for layer in range(depth):
            kept = self.alive.get(layer)
            now = now if kept is None else kept.shape[1]
            lengths.append(now - self.padding)
        return lengths

    def _reduce(
        self, reducer: Reducer, x: Tensor, inside: dict[Signal, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """x [b, n, d] -> (x of what is left [b, k, d], its places among the n, long [b, k])."""
        if self.inputs is not None:
            inside = inside | {Signal.INPUT_EMBEDDINGS: self.inputs}
        all_spans = [(i, span) for i, spans in enumerate(self.rows) for span in spans]
        given = [
            span.entering(reducer, x[i], {signal: v[i] for signal, v in inside.items()})
            for i, span in all_spans
        ]
        made = iter(
            reduce_batch(
                reducer,
                [tokens for tokens, _ in given],
                [signals for _, signals in given],
                [span.budget for _, span in all_spans],
                [span.memory for _, span in all_spans],
            )
        )
        whole, rows = [], []
        for spans in self.rows:
            plans = [(span.slots, next(made)) for span in spans]
            lifted = lift(plans, x.shape[1], x.device)
            slot_of = torch.empty(x.shape[1], dtype=torch.long, device=x.device)
            slot_of[lifted.anchor] = torch.arange(lifted.k, device=x.device)
            whole.append(lifted)
            rows.append(
                [
                    replace(s, slots=slot_of[s.slots[plan.anchor]], plan=plan @ s.plan)
                    for s, (_, plan) in zip(spans, plans, strict=True)
                ]
            )
        lengths = sorted({lifted.k for lifted in whole})
        if len(lengths) > 1:
            raise AttachError(
                f"The sequences of the batch shrink to different lengths ({lengths}); give all "
                "videos of a batch the same number of frames, or run them one by one."
            )
        self.rows = rows
        kept = torch.stack([lifted.anchor for lifted in whole])
        self.queries = self.queries.at(kept)
        if self.inputs is not None:
            self.inputs = _applied(whole, self.inputs)
        return _applied(whole, x), kept


def _applied(plans: list[Plan], x: Tensor) -> Tensor:
    return torch.stack([plan.apply(one) for plan, one in zip(plans, x, strict=True)])


def lift(plans: list[tuple[Tensor, Plan]], length: int, device: torch.device) -> Plan:
    """Plans over some places of a sequence -> one plan over the whole sequence.

    plans: (slots long [n], plan over n tokens) of each video; all other places pass. The rows of
    a plan take the places of its anchors in order, so a plan whose rows are not ascending keeps
    its own order.
    """
    passing = torch.ones(length, dtype=torch.bool, device=device)
    anchors, places, rows, cols, weights = [], [], [], [], []
    first = 0
    for slots, plan in plans:
        passing.index_fill_(0, slots, False)
        row, col, weight = plan.entries()
        anchors.append(slots[plan.anchor])
        places.append(slots[plan.anchor.sort().values])
        rows.append(row + first)
        cols.append(slots[col])
        weights.append(weight)
        first += plan.k
    order = torch.sort(passing.byte(), descending=True, stable=True).indices
    text = order[: length - sum(slots.numel() for slots, _ in plans)]
    anchor = torch.cat([*anchors, text])
    place = torch.cat([*places, text])
    order = torch.argsort(place)
    if all(plan.is_gather for _, plan in plans):
        return Plan.keep(anchor[order], length)
    row = torch.cat([*rows, torch.arange(first, first + text.numel(), device=device)])
    weight = torch.cat([*weights, torch.ones(text.numel(), device=device)])
    new_row = torch.argsort(order)[row]
    return Plan.merge(anchor[order], new_row, torch.cat([*cols, text]), weight, length)
