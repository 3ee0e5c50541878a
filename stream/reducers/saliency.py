"""Keep the patches that the vision encoder attends to most, over the whole video."""

from __future__ import annotations

from typing import ClassVar

from ..data import Budget, VisualTokens
from ..memory import Memory
from ..ops import picks
from ..plan import Plan
from ..signals import Signal, Signals
from .base import Reducer


class Saliency(Reducer):
    """Top-k of received attention: FasterVLM's criterion for encoders without a class token."""

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.SALIENCY})
    source: ClassVar[str] = "arXiv 2412.01818, received attention in place of [CLS]"

    def plan(self, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory) -> Plan:
        return Plan.keep(picks.top(signals[Signal.SALIENCY], budget.tokens), tokens.n)
