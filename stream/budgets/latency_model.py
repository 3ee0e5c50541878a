"""How long the rest of a tick will take: the card, corrected by what this run showed.

median = sum over remaining stages of repeats x p50 on the card x drift of the stage
forecast = median x exp(2 x spread + margin)

The drift follows how fast the machine is (clocks, heat, neighbours), the spread how steady it is:
the first at once, the second within some thirty ticks. The margin, learnt from what remains, makes
the forecast a quantile that is exceeded at the stated rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Self

from pydantic import Field, model_validator

from ..config import Config
from ..errors import ConfigError
from .conformal import Margin
from .latency_card import LatencyCard, Name, isotonic

_SHORTEST_MS = 1e-3
_SPREADS = 2.0
_CLIP = 4.0  # one spike is no unsteadiness
_STEADIEST, _LOOSEST = 0.005, 1.0


class Stages(Config):
    """Which stages of the card follow a decision.

    prefix: run once after the encoder; the reuse of an old prefix skips them.
    step: runs once for each flow step or decoded token; None when nothing repeats.
    tail: run once, last.
    """

    prefix: tuple[Name, ...] = ("reduce", "prefill")
    step: Name | None = "flow_step"
    tail: tuple[Name, ...] = ("action_head",)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"stages {self.names} must be at least one and distinct")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.prefix, *((self.step,) if self.step else ()), *self.tail)


class ModelConfig(Config):
    """How fast the model learns.

    target_miss: rate at which a forecast may be exceeded.
    weight: of the newest tick in the drift, once settled; the spread gives it half as much.
    surprise: a tick this many times above its forecast, or as far below its median as that is
        above it, means that the machine changed: the drift starts over from this tick, with
        weights 1, 1/2, 1/3, ... until `weight`.
    drift_limit: the drift stays within [1 / drift_limit, drift_limit].
    window: ticks whose spread the margin is taken from; at least 2 / target_miss is useful.
    rate: how far one miss moves the level of the margin.
    """

    target_miss: Annotated[float, Field(gt=0, lt=0.5)] = 0.01
    weight: Annotated[float, Field(gt=0, le=1)] = 0.1
    surprise: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 1.25
    drift_limit: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 16.0
    window: Annotated[int, Field(ge=16, le=4096)] = 512
    rate: Annotated[float, Field(gt=0, lt=1)] = 0.002


class Point(IntEnum):
    """Where in a tick a forecast is made; each has a margin of its own."""

    ENCODE = 0
    PREFILL = 1


@dataclass(frozen=True, slots=True)
class LatencyState:
    """What was learnt about the machine.

    drift: for each stage, the factor on the card's times.
    weight: of the next tick in the drift.
    spreads: for each Point, how far the log of a tick's time usually lies from its median.
    margins: for each Point, log factor on top of two spreads.
    above: for each Point, the factor from median to forecast; follows from the two before.
    """

    drift: tuple[float, ...]
    weight: float
    spreads: tuple[float, float]
    margins: tuple[Margin, Margin]
    above: tuple[float, float]

    @classmethod
    def of(
        cls,
        drift: tuple[float, ...],
        weight: float,
        spreads: Sequence[float],
        margins: Sequence[Margin],
    ) -> LatencyState:
        first, second = (
            math.exp(_SPREADS * spread + margin.value)
            for spread, margin in zip(spreads, margins, strict=True)
        )
        both = (spreads[0], spreads[1]), (margins[0], margins[1])
        return cls(drift, weight, *both, (first, second))


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """Pure functions of (state, event); build with `of`."""

    config: ModelConfig
    source: str
    stages: tuple[str, ...]
    buckets: tuple[int, ...]
    _work: tuple[tuple[tuple[int, bool], ...], tuple[tuple[int, bool], ...]]
    _p50_ms: tuple[tuple[float, ...], ...]
    _prior: tuple[tuple[float, ...], tuple[float, ...]]

    @classmethod
    def of(
        cls, card: LatencyCard, stages: Stages, config: ModelConfig, device: str, steps: int = 1
    ) -> LatencyModel:
        """A model of the stages that follow a decision.

        device: where this runs; a card of another device makes `source` a latency transplant.
        steps: the usual number of repeats, for the margin's starting point alone.
        Raises ConfigError when the card lacks a stage.
        """
        unknown = [stage for stage in stages.names if stage not in card.stages]
        if unknown:
            raise ConfigError(
                f"The card of {card.model} has no stage {unknown[0]!r}; it has "
                f"{', '.join(card.stages)}. Calibrate again or name other stages."
            )
        every = tuple((i, stage == stages.step) for i, stage in enumerate(stages.names))
        work = (every, every[len(stages.prefix) :])
        prior = tuple(_card_logs(card, stages.names, steps, w, config.window) for w in work)
        return cls(
            config,
            card.label(device),
            stages.names,
            card.buckets,
            work,
            _medians_ms(card, stages.names),
            (prior[0], prior[1]),
        )

    def start(self) -> LatencyState:
        spreads = [_within(_median([abs(log) for log in logs])) for logs in self._prior]
        margins = [
            Margin.start(
                [log - _SPREADS * spread for log in logs], self.config.target_miss, self.config.rate
            )
            for logs, spread in zip(self._prior, spreads, strict=True)
        ]
        return LatencyState.of((1.0,) * len(self.stages), 1.0, spreads, margins)

    def predict_ms(self, state: LatencyState, bucket: int, steps: int, point: Point) -> float:
        """High quantile of the time from `point` to the result.

        bucket: position in `buckets`.
        """
        return self._median_ms(state, bucket, steps, point) * state.above[point]

    def observe(
        self,
        state: LatencyState,
        bucket: int,
        steps: int,
        stage_ms: Mapping[str, float],
        elapsed_ms: float,
    ) -> LatencyState:
        """Learn from one tick that ran at position `bucket` with `steps` repeats.

        A stage that did not run moves towards the card, so that a slow spell ends even when its
        stage is avoided. Stages the model does not know are ignored.
        """
        logs = self._logs(state, bucket, steps, stage_ms, elapsed_ms)
        margins, spreads, surprised = [], [], False
        for point, log in zip(Point, logs, strict=True):
            margin, spread = state.margins[point], state.spreads[point]
            if log is None:
                margins.append(margin.skip())
                spreads.append(spread)
                continue
            surprised |= abs(log) > math.log(state.above[point] * self.config.surprise)
            margins.append(margin.observe(log - _SPREADS * spread))
            ratio = min(max(abs(log) / spread, 1 / _CLIP), _CLIP)
            spreads.append(_within(spread * ratio ** (self.config.weight / 2)))
        weight = 1.0 if surprised else state.weight
        drift = tuple(
            self._drifted(state, stage, bucket, steps, stage_ms, weight)
            for stage in range(len(self.stages))
        )
        following = max(self.config.weight, weight / (1 + weight))
        return LatencyState.of(drift, following, spreads, margins)

    def _median_ms(self, state: LatencyState, bucket: int, steps: int, point: Point) -> float:
        row, drift = self._p50_ms[bucket], state.drift
        ms = 0.0
        for stage, repeats in self._work[point]:
            ms += row[stage] * drift[stage] * (steps if repeats else 1)
        return max(_SHORTEST_MS, ms)

    def _logs(
        self,
        state: LatencyState,
        bucket: int,
        steps: int,
        stage_ms: Mapping[str, float],
        elapsed_ms: float,
    ) -> list[float | None]:
        """log(took / median) for each Point, None where not all of its stages ran.

        The first Point that ran is judged by the elapsed time, gaps between stages included.
        """
        logs: list[float | None] = []
        taken_ms: float | None = elapsed_ms
        for point in Point:
            names = [self.stages[i] for i, _ in self._work[point]]
            if not names or any(name not in stage_ms for name in names):
                logs.append(None)
                continue
            took = sum(stage_ms[name] for name in names) if taken_ms is None else taken_ms
            taken_ms = None
            median = self._median_ms(state, bucket, steps, point)
            logs.append(math.log(max(took, _SHORTEST_MS) / median))
        return logs

    def _drifted(
        self,
        state: LatencyState,
        stage: int,
        bucket: int,
        steps: int,
        stage_ms: Mapping[str, float],
        weight: float,
    ) -> float:
        before = math.log(state.drift[stage])
        took = stage_ms.get(self.stages[stage])
        if took is None:
            return math.exp(before * (1 - self.config.weight))
        repeats = steps if (stage, True) in self._work[Point.ENCODE] else 1
        card_ms = max(_SHORTEST_MS, self._p50_ms[bucket][stage] * repeats)
        after = before + weight * (math.log(max(took, _SHORTEST_MS) / card_ms) - before)
        limit = math.log(self.config.drift_limit)
        return math.exp(min(max(after, -limit), limit))


def _medians_ms(card: LatencyCard, stages: tuple[str, ...]) -> tuple[tuple[float, ...], ...]:
    """[bucket][stage] milliseconds, not falling with the bucket."""
    columns = []
    for stage in stages:
        rows = [card.row(stage, bucket) for bucket in card.buckets]
        columns.append(isotonic([row.p50_ms for row in rows], [row.count for row in rows]))
    return tuple(zip(*columns, strict=True))


def _card_logs(
    card: LatencyCard,
    stages: tuple[str, ...],
    steps: int,
    work: tuple[tuple[int, bool], ...],
    size: int,
) -> tuple[float, ...]:
    """What ticks of the card itself would score, all buckets in turn, all stages slow together."""
    stride = next(s for s in range(size * 5 // 8, size) if math.gcd(s, size) == 1)
    logs = []
    for i in range(size):
        level = (i * stride % size + 0.5) / size
        bucket = card.buckets[i % len(card.buckets)]
        rows = [(card.row(stages[s], bucket), steps if r else 1) for s, r in work]
        took = sum(row.at(level) * n for row, n in rows)
        usual = sum(row.p50_ms * n for row, n in rows)
        logs.append(math.log(max(took, _SHORTEST_MS) / max(usual, _SHORTEST_MS)))
    return tuple(logs)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _within(spread: float) -> float:
    return min(max(spread, _STEADIEST), _LOOSEST)
