"""Keep everything: the full-token row of every table."""

from __future__ import annotations

from ..data import Budget, VisualTokens
from ..memory import Memory
from ..plan import Plan
from ..signals import Signals
from .base import Reducer


class Identity(Reducer):
    """Keeps every token, whatever the budget."""

    def keeps(self, n: int, budget: Budget) -> int:
        return n

    def plan(self, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory) -> Plan:
        return Plan.identity(tokens.n, tokens.x.device)
