"""The latency card: how long each stage of a model takes on one device, by token bucket.

A card is measured once, kept as JSON, and read by the latency model. It holds what was measured,
unsmoothed; whoever needs times that grow with the bucket smooths on reading (`isotonic`).
"""

from __future__ import annotations

import json
import math
import random
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, ValidationError, model_validator

from ..config import Config
from ..errors import ConfigError, ValueShapeError

LARGEST_BYTES = 1 << 20
LEVELS = (0.0, 0.5, 0.95, 0.99, 1.0)
Ms = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=40)]
Text = Annotated[str, Field(min_length=1, max_length=200)]

Measure = Callable[[int], Mapping[str, float]]


class StageTiming(Config):
    """How long one stage took at one bucket.

    stage: its name; a stage that repeats (a flow step, a decoded token) is timed for one repeat.
    bucket: visual tokens that entered the language model.
    count: samples behind the numbers, none left out.
    """

    stage: Name
    bucket: Count
    count: Count
    mean_ms: Ms
    min_ms: Ms
    p50_ms: Ms
    p95_ms: Ms
    p99_ms: Ms
    max_ms: Ms

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        times = self.quantiles_ms
        if any(a > b for a, b in pairwise(times)):
            raise ValueError(f"min, p50, p95, p99, max of {self.stage} must not fall: {times}")
        if not self.min_ms <= self.mean_ms <= self.max_ms:
            raise ValueError(f"the mean of {self.stage} lies outside its min and max")
        return self

    @classmethod
    def of(cls, stage: str, bucket: int, samples_ms: Sequence[float]) -> StageTiming:
        """Summary of samples. Each quantile is a sample, the higher one where it falls between."""
        rounded = np.round(np.asarray(samples_ms, dtype=np.float64), 5)
        p50, p95, p99 = np.quantile(rounded, (0.5, 0.95, 0.99), method="higher").tolist()
        low, high = float(rounded.min()), float(rounded.max())
        return cls(
            stage=stage,
            bucket=bucket,
            count=len(rounded),
            mean_ms=min(high, max(low, round(float(rounded.mean()), 5))),
            min_ms=low,
            p50_ms=p50,
            p95_ms=p95,
            p99_ms=p99,
            max_ms=high,
        )

    def at(self, level: float) -> float:
        """The quantile of `level` in [0, 1], milliseconds, on straight lines between those kept."""
        i = min(max(bisect_right(LEVELS, level), 1), len(LEVELS) - 1)
        low, high = self.quantiles_ms[i - 1 : i + 1]
        share = (level - LEVELS[i - 1]) / (LEVELS[i] - LEVELS[i - 1])
        return low + min(max(share, 0.0), 1.0) * (high - low)

    @property
    def quantiles_ms(self) -> tuple[float, ...]:
        """Milliseconds at LEVELS."""
        return (self.min_ms, self.p50_ms, self.p95_ms, self.p99_ms, self.max_ms)


class LatencyCard(Config):
    """Stage times of one model on one device.

    device, threads, dtype, model: what ran; `threads` is the number of CPU threads it could use.
    date: the day of measurement, YYYY-MM-DD, stated by whoever measured.
    shapes: named sizes that the times depend on, such as {"cameras": [2], "image": [128, 128, 3]}.
    warmup, seed: calls a bucket before the first sample, and the seed of the order of measurement.
    timings: one row for each stage and bucket.
    """

    format: Literal["foveate latency card"] = "foveate latency card"
    version: Literal[1] = 1
    model: Text
    device: Text
    threads: Count
    dtype: Text
    date: Text
    shapes: dict[str, tuple[int, ...]]
    warmup: Annotated[int, Field(ge=0)]
    seed: int
    timings: Annotated[tuple[StageTiming, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _complete(self) -> Self:
        date.fromisoformat(self.date)
        held = [(row.stage, row.bucket) for row in self.timings]
        if len(set(held)) < len(held):
            twice = next(key for key in held if held.count(key) > 1)
            raise ValueError(f"stage and bucket {twice} appear twice")
        lacking = {(s, b) for s in self.stages for b in self.buckets} - set(held)
        if lacking:
            raise ValueError(f"stage and bucket {min(lacking)} are missing")
        return self

    @property
    def buckets(self) -> tuple[int, ...]:
        """Token counts that were measured, ascending."""
        return tuple(sorted({row.bucket for row in self.timings}))

    @property
    def stages(self) -> tuple[str, ...]:
        """Stages in the order of the card."""
        return tuple(dict.fromkeys(row.stage for row in self.timings))

    def row(self, stage: str, bucket: int) -> StageTiming:
        for row in self.timings:
            if row.stage == stage and row.bucket == bucket:
                return row
        raise ConfigError(
            f"The card of {self.model} has no stage {stage!r} at {bucket} tokens. It has the "
            f"stages {', '.join(self.stages)} and the buckets {', '.join(map(str, self.buckets))}."
        )

    def label(self, device: str) -> str:
        """What the times stand for in a run on `device`; another device's card says so."""
        own = f"{self.model} on {self.device}"
        return own if device == self.device else f"latency transplant of {own}"

    def to_json(self) -> str:
        """Text for people and for `from_json`: one line for each timing."""
        head = self.model_dump(mode="json", exclude={"timings"})
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
        rows = [f"    {json.dumps(row.model_dump(mode='json'))}" for row in self.timings]
        body = ",\n".join(rows)
        return "\n".join(["{", *lines, '  "timings": [', body, "  ]", "}"]) + "\n"

    @classmethod
    def from_json(cls, text: str, origin: str = "latency card") -> LatencyCard:
        """Read `to_json` back. Raises ConfigError that names every wrong key; coerces nothing."""
        if len(text) > LARGEST_BYTES:
            raise ConfigError(f"{origin} has {len(text)} characters; a card has at most a million.")
        try:
            json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            lines = [
                f"{'.'.join(map(str, d['loc'])) or 'the card'}: {d['msg']}."
                for d in error.errors(include_url=False, include_context=False, include_input=False)
            ]
            raise ConfigError("\n  ".join([f"{origin} is refused:", *lines])) from None
        except RecursionError:
            raise ConfigError(f"{origin} is nested too deeply to be a latency card.") from None
        except ValueError as error:
            raise ConfigError(f"{origin} is not a JSON latency card: {error}.") from None

    @classmethod
    def load(cls, path: str | Path) -> LatencyCard:
        """Read a card from a file. Raises ConfigError when that is not possible."""
        try:
            with Path(path).open("rb") as file:
                text = file.read(LARGEST_BYTES + 1).decode()
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
        except UnicodeDecodeError:
            raise ConfigError(f"{path} is not UTF-8 text; is it a latency card?") from None
        return cls.from_json(text, str(path))

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")


def calibrate(
    measure: Measure,
    buckets: Sequence[int],
    stages: Sequence[str],
    *,
    repeats: int = 200,
    warmup: int = 20,
    seed: int = 0,
) -> tuple[StageTiming, ...]:
    """Time every stage at every bucket; the rows of a card.

    measure: runs the model once at a bucket and returns milliseconds for each stage.
    repeats: samples a bucket. Every round visits each bucket once, in a new random order, so that
        a clock that drifts or a neighbour that wakes up touches all buckets alike.
    warmup: rounds before the first sample, thrown away.

    Every sample counts: a spike stays in. An error of `measure` ends the calibration. Raises
    ValueShapeError when `measure` returns other stages or a time that is negative or not finite,
    and ConfigError for impossible counts.
    """
    if not buckets or len(set(buckets)) < len(buckets) or min(buckets) < 1:
        raise ConfigError(f"Buckets {list(buckets)} must be distinct, at least 1, and not none.")
    if repeats < 1 or warmup < 0 or not stages:
        raise ConfigError(f"{repeats} repeats, {warmup} warm-up rounds and {len(stages)} stages.")
    order = random.Random(seed)
    samples: dict[int, dict[str, list[float]]] = {b: {s: [] for s in stages} for b in buckets}
    for sampled in [False] * warmup + [True] * repeats:
        for bucket in order.sample(list(buckets), len(buckets)):
            times_ms = measure(bucket)
            _check_sample(times_ms, stages, bucket)
            if sampled:
                for stage in stages:
                    samples[bucket][stage].append(times_ms[stage])
    return tuple(StageTiming.of(s, b, samples[b][s]) for s in stages for b in sorted(buckets))


def isotonic(values: Sequence[float], weights: Sequence[float]) -> tuple[float, ...]:
    """The non-decreasing values nearest to `values` in weighted squares (pool adjacent violators).

    Where a larger bucket measured faster than a smaller one, both get their weighted mean.
    """
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        block = (value, weight, 1)
        while blocks and blocks[-1][0] >= block[0]:
            mean, total, size = blocks.pop()
            both = total + block[1]
            block = ((mean * total + block[0] * block[1]) / both, both, size + block[2])
        blocks.append(block)
    return tuple(mean for mean, _, size in blocks for _ in range(size))


def _check_sample(times_ms: Mapping[str, float], stages: Sequence[str], bucket: int) -> None:
    if set(times_ms) != set(stages):
        raise ValueShapeError(
            f"The measurement at {bucket} tokens returned the stages {sorted(times_ms)}; "
            f"{sorted(stages)} were asked for."
        )
    for stage, ms in times_ms.items():
        if not (math.isfinite(ms) and ms >= 0):
            raise ValueShapeError(f"Stage {stage} at {bucket} tokens took {ms} ms.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} appears twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no time")
