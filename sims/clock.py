"""The clock that does not wait: how long a stage takes, and what the robot does meanwhile."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from stream.budgets.latency_card import LatencyCard, StageTiming
from stream.budgets.latency_model import Stages
from stream.errors import ConfigError

STAGES = Stages(prefix=("prefill",), step="act", tail=())
"""What follows the encoder. Reduction and prefill are one stage; `act` is timed for one step."""
ENCODE = "encode"

Floats = NDArray[np.float32]
Mode = Literal["realtime", "waiting"]


class TimeSource(Protocol):
    """Runs a stage and says how long it took.

    label: whose times these are; a latency transplant says so.
    """

    @property
    def label(self) -> str: ...

    def run[T](
        self, stage: str, tokens: int, repeats: int, level: float, call: Callable[[], T]
    ) -> tuple[T, float]:
        """(result, milliseconds). level: how unlucky this call is, in [0, 1), for drawn times."""


@dataclass(frozen=True, slots=True)
class WallTime:
    """What the real policy takes on this machine, waiting for the device after each stage."""

    device: torch.device
    label: str = "wall clock"

    def run[T](
        self, stage: str, tokens: int, repeats: int, level: float, call: Callable[[], T]
    ) -> tuple[T, float]:
        start = time.perf_counter()
        result = call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return result, (time.perf_counter() - start) * 1e3


@dataclass(frozen=True, slots=True)
class CardTime:
    """What a card says, whatever this machine takes."""

    card: LatencyCard
    label: str

    def run[T](
        self, stage: str, tokens: int, repeats: int, level: float, call: Callable[[], T]
    ) -> tuple[T, float]:
        buckets = self.card.buckets
        bucket = buckets[min(bisect_left(buckets, tokens), len(buckets) - 1)]
        return call(), self.card.row(stage, bucket).at(level) * repeats


def stated_card(text: str, tokens: int) -> LatencyCard:
    """A card of stated times: `60` for all buckets, or `64=30,256=55,512=90` by bucket.

    tokens: the largest bucket. All of a time is spent in the prefill; the rest costs nothing.
    Raises ConfigError for anything else.
    """
    try:
        pairs = [p.split("=") for p in text.split(",")] if "=" in text else [[str(tokens), text]]
        times = {int(bucket): float(ms) for bucket, ms in pairs}
    except ValueError:
        raise ConfigError(
            f"The stated time {text!r} must look like 60, or like 64=30,512=90 (bucket=ms)."
        ) from None
    if min(times) < 1 or any(not (math.isfinite(ms) and ms >= 0) for ms in times.values()):
        raise ConfigError(f"Buckets and times of {text!r} must be positive and finite.")
    rows = [
        StageTiming.of(stage, bucket, [ms if stage == "prefill" else 0.0])
        for stage in (ENCODE, *STAGES.names)
        for bucket, ms in sorted(times.items())
    ]
    return LatencyCard(
        model=f"{text} ms",
        device="stated times",
        threads=1,
        dtype="none",
        date="1970-01-01",
        shapes={"visual_tokens": (tokens,)},
        warmup=0,
        seed=0,
        timings=tuple(rows),
    )


def check_card(card: LatencyCard, origin: str | Path) -> LatencyCard:
    """The card, if it has the stages of a robot policy. Raises ConfigError otherwise."""
    lacking = [s for s in (ENCODE, *STAGES.names) if s not in card.stages]
    if lacking:
        raise ConfigError(
            f"{origin} has the stages {', '.join(card.stages)} and lacks {', '.join(lacking)}; "
            "make a card of a robot policy with `foveate calibrate`."
        )
    return card


@dataclass(frozen=True, slots=True, eq=False)
class Playback:
    """What the robot executes while nothing newer is there: the rest of a chunk, then holds.

    chunk: float32 [n, a]; position: of the next action in it. started: whether there was any
    chunk yet. moves, holds: control periods of the episode spent on either.
    last: the last action executed, holds included.
    """

    chunk: Floats
    position: int = 0
    started: bool = False
    moves: int = 0
    holds: int = 0
    last: Floats | None = None

    @classmethod
    def empty(cls, action_size: int) -> Playback:
        return cls(np.zeros((0, action_size), np.float32))

    @property
    def left(self) -> int:
        """Actions not executed yet."""
        return len(self.chunk) - self.position

    @property
    def steps(self) -> int:
        """Control periods of the episode so far."""
        return self.moves + self.holds

    def next(self, hold: Callable[[Floats | None], Floats]) -> tuple[Playback, Floats]:
        """One control period on: the next action of the chunk, or the hold."""
        if self.left:
            action = self.chunk[self.position]
            moved = replace(self, position=self.position + 1, moves=self.moves + 1)
            return replace(moved, last=action), action
        action = hold(self.last)
        return replace(self, holds=self.holds + 1, last=action), action

    def deliver(self, chunk: Floats, skip: int) -> Playback:
        """A new chunk, whose first `skip` actions are past. Nothing changes if all of them are."""
        if skip >= len(chunk):
            return self
        return replace(self, chunk=chunk, position=skip, started=True)


def periods(elapsed_ms: float, dt_s: float) -> int:
    """Control periods that begin before a result of `elapsed_ms` is there."""
    return math.ceil(elapsed_ms / (dt_s * 1000) - 1e-9)
