"""What came of episodes, counted tick by tick."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from stream.ticks import Tick

LEVELS = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


class Tally:
    """Counters over any number of episodes.

    inferences: ticks that computed actions. missed: promised in time, came late or not at all.
    announced: came late, as was foreseen. held, steps: control periods.
    tokens: inferences by bucket. rungs: ticks by what was decided. got: by what the robot did at
    the deadline. gave_up, said: how often each thing was given up or went wrong.
    """

    def __init__(self) -> None:
        self.ticks = self.inferences = self.missed = self.announced = self.steps = self.held = 0
        self.tokens: Counter[int] = Counter()
        self.rungs: Counter[str] = Counter()
        self.got: Counter[str] = Counter()
        self.gave_up: Counter[str] = Counter()
        self.said: Counter[str] = Counter()
        self.times_ms: dict[str, list[float]] = {}

    def add(self, tick: Tick) -> None:
        decision = tick.decision
        self.ticks += 1
        self.steps += len(tick.executed)
        self.held += tick.held
        self.missed += tick.missed
        self.announced += tick.late and not tick.promised and tick.chunk is not None
        self.rungs[decision.rung.name] += 1
        self.got[tick.got.name] += 1
        self.gave_up.update(decision.gave_up)
        self.said.update(tick.said)
        for stage, ms in tick.stage_ms.items():
            self.times_ms.setdefault(stage, []).append(ms)
        if tick.chunk is not None:
            self.inferences += 1
            self.tokens[decision.tokens] += 1
            self.times_ms.setdefault("whole", []).append(tick.elapsed_ms)

    @property
    def mean_tokens(self) -> float:
        return sum(t * n for t, n in self.tokens.items()) / max(1, self.inferences)

    @property
    def miss_rate(self) -> float:
        return self.missed / max(1, self.inferences)

    def quantiles_ms(self) -> dict[str, dict[str, float]]:
        """Of each stage and of the whole; each a sample, the higher where it falls between."""
        return {s: quantiles(times) for s, times in sorted(self.times_ms.items())}

    def to_record(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "ticks": self.ticks,
            "inferences": self.inferences,
            "misses": self.missed,
            "announced_late": self.announced,
            "steps": self.steps,
            "held_steps": self.held,
            "mean_tokens": round(self.mean_tokens, 2),
            "buckets": {str(t): n for t, n in sorted(self.tokens.items())},
            "rungs": dict(self.rungs),
            "got": dict(self.got),
            "gave_up": dict(self.gave_up),
            "said": dict(self.said),
            "ms": self.quantiles_ms(),
        }


def quantiles(times_ms: Sequence[float]) -> dict[str, float]:
    found = np.quantile(np.asarray(times_ms), list(LEVELS.values()), method="higher")
    return {name: round(float(ms), 3) for name, ms in zip(LEVELS, found, strict=True)}
