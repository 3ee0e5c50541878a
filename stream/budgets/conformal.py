"""How far above a forecast one must go so that it is exceeded at a stated rate.

Adaptive conformal inference (Gibbs and Candes, 2021) on the newest scores: the margin is their
quantile at level 1 - alpha, and alpha itself moves with every hit and miss.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
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
    ascending: the same, sorted.
    """

    target: float
    rate: float
    alpha: float
    scores: tuple[float, ...]
    ascending: tuple[float, ...]

    @classmethod
    def start(cls, scores: Sequence[float], target: float, rate: float) -> Margin:
        """scores: what is expected before anything was seen, such as the spread on a card."""
        return cls(target, rate, target, tuple(scores), tuple(sorted(scores)))

    @property
    def value(self) -> float:
        """The score that a new one exceeds with probability alpha, were all exchangeable."""
        n = len(self.ascending)
        rank = (1 - self.alpha) * (n + 1)
        if rank > n:
            return self.ascending[-1] + _BEYOND * (rank - n)
        return self.ascending[max(math.ceil(rank - 1e-9), 1) - 1]

    def observe(self, score: float) -> Margin:
        """The margin after one more score."""
        alpha = self._moved(missed=score > self.value)
        ascending = list(self.ascending)
        del ascending[bisect_left(ascending, self.scores[0])]
        insort(ascending, score)
        scores = (*self.scores[1:], score)
        return Margin(self.target, self.rate, alpha, scores, tuple(ascending))

    def skip(self) -> Margin:
        """The margin after a tick without a score: a hit, since nothing was exceeded."""
        return replace(self, alpha=self._moved(missed=False))

    def _moved(self, missed: bool) -> float:
        alpha = self.alpha + self.rate * (self.target - missed)
        return min(max(alpha, 0.0), 5 * self.target)
