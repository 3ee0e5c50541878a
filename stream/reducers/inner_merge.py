"""HoliTom's second half: inside the model, drop tokens by attention and fold them into others."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..data import Budget, VisualTokens
from ..memory import Memory
from ..ops import merges, picks, similarity
from ..plan import Plan
from ..signals import Signal, Signals
from .base import Reducer, Site


class InnerMerge(Reducer):
    """Keeps the tokens the last row attends to most and folds each other one into the most
    similar kept one: target = (target + source) / 2 in token order, as one closed-form map.

    layer: decoder layer, or share of the depth (the paper's 18 of 28).
    drop: share of the incoming visual tokens that is folded away.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.LAST_ROW})
    source: ClassVar[str] = "arXiv 2505.21334, inner-LLM merging"

    layer: int | float = 18 / 28
    drop: float = Field(default=0.5, ge=0, lt=1)

    @property
    def site(self) -> Site:
        return Site(self.layer)

    def keeps(self, n: int, budget: Budget) -> int:
        return min(round(n * (1 - self.drop)), budget.tokens)

    def plan(self, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory) -> Plan:
        kept = picks.top(signals[Signal.LAST_ROW], budget.tokens)
        return fold(tokens.x, kept)


def fold(x: Tensor, kept: Tensor) -> Plan:
    """Fold every token that is not kept into its most similar kept one.

    x: [n, d] states, similarities are taken before anything is merged; kept: long [k] ascending.
    """
    n, k = x.shape[0], kept.numel()
    if k in (0, n):
        return Plan.keep(kept, n)
    gone = torch.ones(n, dtype=torch.bool, device=x.device).index_fill_(0, kept, False)
    source = picks.places(gone, n - k)
    slot = similarity.cosine(x[source].float(), x[kept].float()).argmax(-1)
    given, own = merges.halving_weights(slot, k)
    row = torch.cat([torch.arange(k, device=x.device), slot])
    return Plan.merge(kept, row, torch.cat([kept, source]), torch.cat([own, given]), n)
