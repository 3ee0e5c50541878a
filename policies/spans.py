"""Where visual tokens stand in the sequences of a batch, and how a stage shrinks them there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from stream.data import Budget, PatchGrid, VisualTokens
from stream.errors import AttachError
from stream.memory import Memory
from stream.plan import Plan
from stream.reducers.base import Reducer, reduce_stage
from stream.signals import Signal, Signals


@dataclass(frozen=True, slots=True)
class VisualSpan:
    """The visual tokens of one video, or of a robot's cameras at one moment, inside one sequence.

    slots: long [n], their places in the sequence; plan: what became of the video's tokens so far.
    """

    slots: Tensor
    grid: PatchGrid
    pts_s: tuple[float, ...]
    budget: Budget
    plan: Plan
    signals: Signals
    memory: Memory = field(default_factory=Memory)

    def reduced(self, reducer: Reducer, x: Tensor, extra: dict[Signal, Tensor]) -> Plan:
        """Run one stage over this video's rows of x [t, d]; `extra` signals are [t]."""
        tokens = VisualTokens(x[self.slots], self.plan.anchor, self.grid, self.pts_s)
        local = {signal: value[self.slots] for signal, value in extra.items()}
        return reduce_stage(reducer, tokens, self.signals.extended(local), self.budget, self.memory)


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
        passing[slots] = False
        row, col, weight = plan.entries()
        anchors.append(slots[plan.anchor])
        places.append(slots[plan.anchor.sort().values])
        rows.append(row + first)
        cols.append(slots[col])
        weights.append(weight)
        first += plan.k
    text = passing.nonzero().squeeze(-1)
    anchor = torch.cat([*anchors, text])
    place = torch.cat([*places, text])
    order = torch.argsort(place)
    if all(plan.is_gather for _, plan in plans):
        return Plan.keep(anchor[order], length)
    row = torch.cat([*rows, torch.arange(first, first + text.numel(), device=device)])
    weight = torch.cat([*weights, torch.ones(text.numel(), device=device)])
    new_row = torch.argsort(order)[row]
    return Plan.merge(anchor[order], new_row, torch.cat([*cols, text]), weight, length)


def reduce_rows(
    rows: Sequence[Sequence[VisualSpan]], reducer: Reducer, x: Tensor, extra: dict[Signal, Tensor]
) -> tuple[Tensor, Tensor, list[list[VisualSpan]]]:
    """Run one stage over every sequence of a batch.

    rows: the spans of each sequence; x: [b, n, d]; extra: signals, [b, n] or [b, n, d] each.
    Returns x of what is left [b, k, d], its places among the n, long [b, k], and the rows as they
    stand now. Raises AttachError when the sequences shrink to different lengths.
    """
    outputs, kept, left = [], [], []
    for i, spans in enumerate(rows):
        local = {signal: value[i] for signal, value in extra.items()}
        plans = [(s.slots, s.reduced(reducer, x[i], local)) for s in spans]
        whole = lift(plans, x.shape[1], x.device)
        outputs.append(whole.apply(x[i]))
        kept.append(whole.anchor)
        slot_of = torch.empty(x.shape[1], dtype=torch.long, device=x.device)
        slot_of[whole.anchor] = torch.arange(whole.k, device=x.device)
        left.append(
            [
                replace(s, slots=slot_of[s.slots[plan.anchor]], plan=plan @ s.plan)
                for s, (_, plan) in zip(spans, plans, strict=True)
            ]
        )
    if len({o.shape[0] for o in outputs}) > 1:
        raise AttachError(
            "The sequences of the batch shrink to different lengths "
            f"({sorted({o.shape[0] for o in outputs})}); give all videos of a batch the same "
            "number of frames, or run them one by one."
        )
    return torch.stack(outputs), torch.stack(kept), left
