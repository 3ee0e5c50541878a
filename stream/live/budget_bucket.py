"""How many tokens may reach the model: so many a second, saved up to a limit, shared by streams."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from stream.errors import BudgetError

_PARTS_REMEMBERED = 8


class TokenBucket:
    """Tokens earned over media time and spent by parts; still times are saved for busy ones.

    rate_per_s: tokens earned a second; may be changed while it runs. burst_s: seconds of it that
    can be saved.
    """

    def __init__(self, rate_per_s: float, burst_s: float) -> None:
        if not (rate_per_s > 0 and burst_s > 0):
            raise BudgetError(
                f"A bucket of {rate_per_s:g} tokens a second that holds {burst_s:g} s of them; "
                "both must be above 0."
            )
        self.rate_per_s, self._burst_s = rate_per_s, burst_s
        self._level = self._earned = 0.0
        self._spent: deque[tuple[float, float]] = deque(maxlen=_PARTS_REMEMBERED)

    @property
    def capacity(self) -> float:
        """Tokens it holds when full."""
        return self.rate_per_s * self._burst_s

    @property
    def tokens(self) -> int:
        """Whole tokens that are saved."""
        return int(self._level + 1e-6)

    def earn(self, seconds: float) -> None:
        earned = self.rate_per_s * seconds
        self._earned += earned
        self._level = min(self.capacity, self._level + earned)

    def offer(self, news: float, seconds: float = 0.0) -> int:
        """What a part may take, at least 1: as much for each new frame's worth of patches as was
        earned for one lately, this part included, within what is saved.

        A first part so gets all that was earned, and a part with little that is new leaves some.
        seconds: of the part, where they are not earned yet.
        """
        coming = self.rate_per_s * seconds
        earned = coming + self._earned + sum(e for e, _ in self._spent)
        fair = news * earned / (news + sum(n for _, n in self._spent))
        return max(1, int(min(fair, self._level + coming, self.capacity) + 1e-6))

    def spend(self, tokens: int, news: float) -> None:
        """A part took `tokens`; the one token more that it may need is paid back later."""
        self._level -= tokens
        self._spent.append((self._earned, news))
        self._earned = 0.0


def shares(rate_per_s: float, novelty: Mapping[str, float], floor: float = 0.5) -> dict[str, float]:
    """One rate shared by streams: `floor` of it equally, the rest in proportion to novelty.

    novelty: of each stream, 0 or more; where all are 0 the rest is shared equally too.
    floor: in (0, 1]; 1 is an equal split.
    """
    if not 0 < floor <= 1:
        raise BudgetError(f"The floor of a shared budget is {floor:g}; it must be in (0, 1].")
    if not novelty:
        return {}
    total, equal = sum(novelty.values()), 1 / len(novelty)
    return {
        name: rate_per_s * (floor * equal + (1 - floor) * (new / total if total else equal))
        for name, new in novelty.items()
    }
