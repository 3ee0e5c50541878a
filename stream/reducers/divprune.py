"""DivPrune: keep the tokens that lie farthest apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from ..data import Budget, VisualTokens
from ..memory import Memory
from ..ops import spread
from ..plan import Plan
from ..signals import Signals
from .base import BatchReducer, Site


class DivPrune(BatchReducer):
    """Greedy max-min diversity on cosine distance, over all tokens at once.

    The first pick lies farthest from its nearest neighbour, each later one farthest from the picks
    so far. Unlike the published code it never picks one of several equal tokens twice. Distances
    take 4 n^2 bytes, a few times over.

    layer: decoder layer at whose entry tokens are dropped, or share of the depth; null = before
        the model, as published.
    """

    source: ClassVar[str] = "DivPrune, CVPR 2025"

    layer: int | float | None = None

    @property
    def site(self) -> Site:
        return Site(self.layer)

    def plan_batch(
        self,
        tokens: Sequence[VisualTokens],
        signals: Sequence[Signals],
        budget: Budget,
        memories: Sequence[Memory],
    ) -> list[Plan]:
        x = torch.stack([t.x for t in tokens])
        everyone = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        picked = spread.farthest(x, everyone, budget.tokens).sort(-1).values
        return [Plan.keep(own, x.shape[1]) for own in picked]
