"""PyramidDrop: fewer tokens at each of several depths, by the prompt's last row."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ..data import Budget, VisualTokens
from ..memory import Memory
from ..ops import picks
from ..plan import Plan
from ..signals import Signal, Signals
from .base import Reducer, Site


class PyramidDrop(Reducer):
    """At each of some layers the same share leaves, so that the last one meets the budget.

    The paper's ratios of 1/2, 1/4 and 1/8 are those of a budget of an eighth. It scores with the
    attention of the layer that is about to run; here it is that of the layer before. It gives
    tokens new positions, as `positions="renumber"` does.

    layers: where tokens leave, as layers or shares of the depth, ascending.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.LAST_ROW})
    source: ClassVar[str] = "arXiv 2410.17247"

    layers: tuple[int | float, ...] = Field(default=(8 / 32, 16 / 32, 24 / 32), min_length=1)

    @property
    def site(self) -> Site:
        return Site(self.layers[0])

    @property
    def stages(self) -> tuple[Reducer, ...]:
        return tuple(PyramidDrop(layers=self.layers[i:]) for i in range(len(self.layers)))

    def keeps(self, n: int, budget: Budget) -> int:
        if budget.tokens >= n:
            return n
        return round(n * (budget.tokens / n) ** (1 / len(self.layers)))

    def plan(self, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory) -> Plan:
        return Plan.keep(picks.top(signals[Signal.LAST_ROW], budget.tokens), tokens.n)
