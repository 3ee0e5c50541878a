"""The values that go into and come out of a budget controller."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, Protocol

from ..errors import ValueShapeError


class Rung(IntEnum):
    """What the user gets at the deadline, best first; each rung gives up more than the last."""

    FULL = 0
    SMALLER_BUCKET = 1
    FEWER_STEPS = 2
    BELOW_FLOOR = 3
    REUSE_PREFIX = 4
    CHUNK_TAIL = 5
    HOLD = 6
    STOP = 7


@dataclass(frozen=True, slots=True)
class Situation:
    """What is known when the vision encoder is done.

    slack_ms: time left until the deadline; negative when it has passed, infinite without one.
    useful_ms: time left until a result is of no use at all; 0 when that is the deadline itself. A
        chunk of actions that comes after the queue ran dry still ends the hold.
    tokens: visual tokens there are to choose from; None when all buckets can be filled.
    has_frame: whether there is a new frame to look at. A stuck camera has none.
    actions_left: actions of the last chunk not yet executed.
    prefix_tokens, prefix_age_s: bucket and age of the last prefill whose cache is still there;
        0 tokens when there is none.
    """

    slack_ms: float
    useful_ms: float = 0.0
    tokens: int | None = None
    has_frame: bool = True
    actions_left: int = 0
    prefix_tokens: int = 0
    prefix_age_s: float = 0.0

    def __post_init__(self) -> None:
        if any(math.isnan(t) for t in (self.slack_ms, self.useful_ms, self.prefix_age_s)):
            raise ValueShapeError(f"{self} holds a time that is not a number.")
        least = min(self.actions_left, self.prefix_tokens, self.prefix_age_s)
        if least < 0 or (self.tokens is not None and self.tokens < 0):
            raise ValueShapeError(f"{self} holds a negative count or age.")

    @property
    def cover(self) -> Rung:
        """What is done when nothing new arrives in time."""
        return Rung.CHUNK_TAIL if self.actions_left else Rung.HOLD


@dataclass(frozen=True, slots=True)
class Decision:
    """What to compute now, what the user gets, and why.

    rung: what the user gets at the deadline if the prediction holds.
    tokens: bucket to compute with; 0 when nothing is computed.
    steps: flow steps (or decoded tokens) to compute; 0 when nothing is computed.
    predicted_ms: corrected high quantile of the time still needed; None without a model.
    slack_ms: time that was left when this was decided.
    point: whether this was decided after the encoder or after the prefill.
    late: the computation is expected to end after the deadline; `rung` covers the gap.
    if_late: the answer when the deadline passes without a result.
    floor_broken: fewer tokens than the user's floor are computed with.
    gave_up: what full service would have had and this has not.
    why: one sentence.
    source: where the predicted times come from, "latency transplant of ..." for a card of
        another device.
    epoch: counts resets; an answer to an older epoch belongs to another episode.
    """

    rung: Rung
    tokens: int
    steps: int
    predicted_ms: float | None
    slack_ms: float
    point: Literal["encode", "prefill"]
    late: bool
    if_late: Rung
    floor_broken: bool
    gave_up: tuple[str, ...]
    why: str
    source: str
    epoch: int

    @property
    def runs(self) -> bool:
        """Whether anything is computed."""
        return self.steps > 0

    @property
    def prefills(self) -> bool:
        """Whether a new prefix is computed; the reuse of an old one computes flow steps only."""
        return self.runs and self.rung is not Rung.REUSE_PREFIX


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a computation went.

    stage_ms: time of each stage that ran; for a stage that repeats, all repeats together.
    elapsed_ms: from the first decision until the result was there, gaps included.
    late: whether the result came after the deadline, by the caller's clock.
    """

    stage_ms: Mapping[str, float]
    elapsed_ms: float
    late: bool

    def __post_init__(self) -> None:
        for name, ms in (*self.stage_ms.items(), ("elapsed", self.elapsed_ms)):
            if not (math.isfinite(ms) and ms >= 0):
                raise ValueShapeError(f"{name} took {ms} ms; a time is finite and not negative.")


class Controller[S](Protocol):
    """Turns slack into tokens. Stateless: whoever owns the stream keeps the state S."""

    def start(self) -> S:
        """The state of a new stream."""

    def decide(self, state: S, situation: Situation) -> tuple[S, Decision]:
        """After the encoder: which bucket, how many steps."""

    def refine(self, state: S, decision: Decision, situation: Situation) -> Decision:
        """After the prefill of `decision`: how many steps in the slack that is now left."""

    def observe(self, state: S, decision: Decision, outcome: Outcome) -> S:
        """After a computation ended."""

    def reset(self, state: S) -> S:
        """A new episode: forget the last one, keep what was learnt about the machine."""
