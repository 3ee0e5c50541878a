"""Keep a uniformly random subset: the row every method must beat."""

from __future__ import annotations

import torch

from ..data import Budget, VisualTokens
from ..memory import Memory
from ..plan import Plan
from ..signals import Signals
from .base import Reducer


class RandomKeep(Reducer):
    """Keeps random tokens; the choice depends on the stream's seed and tick alone."""

    def plan(self, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory) -> Plan:
        order = torch.randperm(tokens.n, generator=memory.generator())
        return Plan.keep(order[: budget.tokens].sort().values.to(tokens.x.device), tokens.n)
