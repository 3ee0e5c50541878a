"""FastV: inside the model, keep the tokens the prompt's last row attends to most."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ..data import Budget, VisualTokens
from ..memory import Memory
from ..ops import picks
from ..plan import Plan
from ..signals import Signal, Signals
from .base import Reducer, Site


class FastV(Reducer):
    """Top-k of the last prompt row's attention in the layer before.

    layer: decoder layer at whose entry tokens are dropped.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.LAST_ROW})
    source: ClassVar[str] = "arXiv 2403.06764"

    layer: int = Field(default=2, ge=1)

    @property
    def site(self) -> Site:
        return Site(self.layer)

    def plan(self, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory) -> Plan:
        return Plan.keep(picks.top(signals[Signal.LAST_ROW], budget.tokens), tokens.n)
