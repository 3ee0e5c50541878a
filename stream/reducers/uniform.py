"""Keep tokens evenly spaced over the grid, at a different phase in every frame."""

from __future__ import annotations

from ..data import Budget, VisualTokens
from ..memory import Memory
from ..ops import picks
from ..plan import Plan
from ..signals import Signals
from .base import Reducer


class Uniform(Reducer):
    """Staggered uniform sampling: all frames, all regions, equal spacing."""

    def plan(self, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory) -> Plan:
        if tokens.is_full:
            grid = tokens.grid
            index = picks.staggered(grid.frames, grid.per_frame, budget.tokens)
        else:
            index = picks.spaced(tokens.n, budget.tokens)
        return Plan.keep(index.to(tokens.x.device), tokens.n)
