"""Keep whole frames, evenly spaced in time: fewer frames at equal tokens."""

from __future__ import annotations

import torch

from ..data import Budget, VisualTokens
from ..memory import Memory
from ..ops import picks
from ..plan import Plan
from ..signals import Signals
from .base import Reducer


class UniformFrames(Reducer):
    """As many whole frames as the budget holds; the last frame taken may be sampled evenly."""

    def plan(self, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory) -> Plan:
        frames, held = torch.unique(tokens.frame.cpu(), return_counts=True)
        first = held.cumsum(0) - held
        wanted = min(len(frames), -(-budget.tokens * len(frames) // tokens.n))
        chosen = picks.spaced(len(frames), wanted)
        left = budget.tokens
        parts = []
        for frame in chosen.tolist():
            take = min(left, int(held[frame]))
            parts.append(first[frame] + picks.spaced(int(held[frame]), take))
            left -= take
        index = torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
        spare = torch.ones(tokens.n, dtype=torch.bool)
        spare[index] = False
        rest = spare.nonzero().squeeze(-1)
        index = torch.cat([index, rest[picks.spaced(len(rest), left)]]).sort().values
        return Plan.keep(index.to(tokens.x.device), tokens.n)
