"""How far above a forecast one must go so that it is exceeded at a stated rate.

Adaptive conformal inference (Gibbs and Candes, 2021) on the newest scores: the margin is their
quantile at level 1 - alpha, and alpha itself moves with every hit and miss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

_BEYOND = 0.1


@dataclass(frozen=True, slots=True)
class Margin:
    """State of one margin.

    target: the rate at which scores may exceed the margin.
    rate: how far one miss moves alpha. A hit moves it back by rate * target.
    alpha: the level now, within [0, 5 * target]. The ends keep a long overload from being
        remembered for ever; they also end the textbook guarantee for an adversary, who could
        overshoot every maximum seen. At alpha 0 the margin lies a tenth above the largest score.
    scores: the newest scores, oldest first; their number stays what it was at the start.
    value: the margin, in the scores' unit.
    """

    target: float
    rate: float
    alpha: float
    scores: tuple[float, ...]
    value: float

    @classmethod
    def start(cls, scores: Sequence[float], target: float, rate: float) -> Margin:
        """scores: what is expected before anything was seen, such as the spread on a card."""
        return cls(target, rate, target, tuple(scores), _quantile(scores, target))

    def observe(self, score: float) -> Margin:
        """The margin after one more score."""
        missed = score > self.value
        alpha = self.alpha + self.rate * (self.target - missed)
        alpha = min(max(alpha, 0.0), 5 * self.target)
        scores = (*self.scores[1:], score)
        return replace(self, alpha=alpha, scores=scores, value=_quantile(scores, alpha))


def _quantile(scores: Sequence[float], alpha: float) -> float:
    """The score that a new one exceeds with probability alpha, were all exchangeable."""
    ascending = sorted(scores)
    n = len(ascending)
    rank = (1 - alpha) * (n + 1)
    if rank > n:
        return ascending[-1] + _BEYOND * (rank - n)
    return ascending[max(math.ceil(rank - 1e-9), 1) - 1]
