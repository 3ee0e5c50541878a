"""Slack to tokens: the largest bucket that fits, and a ladder of answers when none does.

The ladder is walked from the top; the first rung whose precondition holds is the decision:

    FULL, SMALLER_BUCKET   a new frame, and a bucket at or above the floor fits with all steps
    FEWER_STEPS            a new frame, and the floor's bucket fits with fewer steps
    BELOW_FLOOR            a new frame, and a bucket below the floor fits with the fewest steps
    REUSE_PREFIX           a prefix that is not too old, and some number of steps fits
    CHUNK_TAIL             actions of the last chunk are left
    HOLD                   always
    STOP                   after `stop_after` ticks in a row without a new action in time;
                           only `reset` leaves it

On CHUNK_TAIL and HOLD something is still computed while there is a new frame and time left: what
fits the time in which a late result is of use, else the floor's bucket with the fewest steps. It
is announced as late, since in time is all a forecast can promise; when it does come in time it is
used like any other result. So the next ticks have something to act on, and the model sees a slow
spell end. For a stream that only looks, HOLD means that the last answer
stands.

Buckets fall at once and rise one at a time, after `rise_after` ticks in a row that had room.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Self

from pydantic import Field, model_validator

from ..config import Config
from ..errors import ConfigError
from .decision import Decision, Outcome, Rung, Situation
from .latency_card import LatencyCard
from .latency_model import LatencyModel, LatencyState, ModelConfig, Point, Stages


@dataclass(frozen=True, slots=True)
class _Offer:
    """A rung, the position of its bucket, and its steps; 0 steps when nothing is computed."""

    rung: Rung
    bucket: int = 0
    steps: int = 0


class ControllerConfig(Config):
    """What the user allows to be given up.

    floor_tokens: least visual tokens for a useful answer. Fewer are used only on BELOW_FLOOR,
        and the decision says so; to rule that out, leave smaller buckets off the card.
    steps: allowed numbers of flow steps, ascending; one number when they are fixed.
    rise_after: ticks in a row that must have had room for the next bucket.
    rise_room: room, as a share of the next bucket's predicted time.
    max_prefix_age_s: oldest prefix that may be used again, seconds.
    stop_after: misses in a row before STOP; None never stops, which suits streams that only look.
    """

    floor_tokens: Annotated[int, Field(ge=0)] = 0
    steps: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1,)
    rise_after: Annotated[int, Field(ge=1)] = 5
    rise_room: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.05
    max_prefix_age_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    stop_after: Annotated[int, Field(ge=1)] | None = 10

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if any(a >= b for a, b in pairwise(self.steps)):
            raise ValueError(f"steps {self.steps} must be ascending")
        return self


@dataclass(frozen=True, slots=True)
class ControllerState:
    """What one stream remembers.

    latency: what was learnt about the machine.
    level: position of the bucket earned so far; None before the first decision.
    room: ticks in a row that had room for the next bucket.
    misses: ticks in a row without a new action in time.
    epoch: resets so far.
    """

    latency: LatencyState
    level: int | None = None
    room: int = 0
    misses: int = 0
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class DeadlineController:
    """The controller of this package; a `decision.Controller` of `ControllerState`."""

    model: LatencyModel
    config: ControllerConfig

    def __post_init__(self) -> None:
        if self.config.floor_tokens > self.model.buckets[-1]:
            raise ConfigError(
                f"The floor of {self.config.floor_tokens} tokens is above the largest bucket; "
                f"the card has {', '.join(map(str, self.model.buckets))}."
            )

    @classmethod
    def of(
        cls,
        card: LatencyCard,
        stages: Stages,
        device: str,
        config: ControllerConfig | None = None,
        latency: ModelConfig | None = None,
    ) -> Self:
        """A controller that starts from a card; `device` is where it runs.

        Raises ConfigError when the card lacks a stage or the floor is above its largest bucket.
        """
        config = config or ControllerConfig()
        model = LatencyModel.of(card, stages, latency or ModelConfig(), device, config.steps[-1])
        return cls(model, config)

    def start(self) -> ControllerState:
        return ControllerState(self.model.start())

    def reset(self, state: ControllerState) -> ControllerState:
        return ControllerState(state.latency, epoch=state.epoch + 1)

    def decide(
        self, state: ControllerState, situation: Situation
    ) -> tuple[ControllerState, Decision]:
        """After the encoder: walk the ladder. The state counts a tick that computes nothing."""
        if self.config.stop_after is not None and state.misses >= self.config.stop_after:
            return state, self._decision(state, situation, _Offer(Rung.STOP), Point.ENCODE)
        seen, behind = None, None
        if situation.has_frame:
            seen, level, room = self._look(state, situation, situation.slack_ms)
            if seen is None:
                behind, level, room = self._look(state, situation, situation.useful_ms)
            state = replace(state, level=level, room=room)
        offer = seen or self._reuse(state, situation) or self._cover(situation, behind)
        if offer.rung is Rung.HOLD and not offer.steps:
            state = replace(state, misses=state.misses + 1)
        return state, self._decision(state, situation, offer, Point.ENCODE)

    def refine(self, state: ControllerState, decision: Decision, situation: Situation) -> Decision:
        """After the prefill: the most steps that fit now, more or fewer than planned.

        When not even the fewest fit, they run late: the prefix is paid for. Those of a decision
        that is late anyway fill the time in which it is of use. A decision without a new prefix
        comes back as it is.
        """
        if not decision.prefills:
            return decision
        bucket = self._position(decision.tokens)
        limit_ms = max(situation.slack_ms, situation.useful_ms if decision.late else 0.0)
        for steps in reversed(self.config.steps):
            needed_ms = self.model.predict_ms(state.latency, bucket, steps, Point.PREFILL)
            if needed_ms <= limit_ms:
                break
        late = needed_ms > situation.slack_ms
        rung = situation.cover if late else self._rung(situation, bucket, steps)
        return self._decision(state, situation, _Offer(rung, bucket, steps), Point.PREFILL)

    def observe(
        self, state: ControllerState, decision: Decision, outcome: Outcome
    ) -> ControllerState:
        """Learn from a computation; one that began before a reset teaches latency alone."""
        latency = self.model.observe(
            state.latency,
            self._position(decision.tokens),
            decision.steps,
            outcome.stage_ms,
            outcome.elapsed_ms,
        )
        if decision.epoch != state.epoch:
            return replace(state, latency=latency)
        return replace(state, latency=latency, misses=state.misses + 1 if outcome.late else 0)

    def _look(
        self, state: ControllerState, situation: Situation, slack_ms: float
    ) -> tuple[_Offer | None, int, int]:
        """The rungs that compute a new prefix in `slack_ms`, with level and room after them."""
        floor, top = self._floor_and_top(situation)
        steps = self.config.steps
        fits = self._largest(state, floor, top, steps[-1], slack_ms)
        if fits is not None:
            level, room = self._rise(state, fits, floor, top, slack_ms)
            return _Offer(self._rung(situation, level, steps[-1]), level, steps[-1]), level, room
        for fewer in reversed(steps[:-1]):
            if self._needed_ms(state, floor, fewer) <= slack_ms:
                return _Offer(Rung.FEWER_STEPS, floor, fewer), floor, 0
        below = self._largest(state, 0, floor - 1, steps[0], slack_ms)
        if below is not None:
            return _Offer(Rung.BELOW_FLOOR, below, steps[0]), below, 0
        return None, floor, 0

    def _reuse(self, state: ControllerState, situation: Situation) -> _Offer | None:
        """The old prefix with the new state of the robot."""
        too_old = situation.prefix_age_s > self.config.max_prefix_age_s
        if situation.prefix_tokens == 0 or too_old:
            return None
        bucket = self._position(situation.prefix_tokens)
        for steps in reversed(self.config.steps):
            needed_ms = self.model.predict_ms(state.latency, bucket, steps, Point.PREFILL)
            if needed_ms <= situation.slack_ms:
                return _Offer(Rung.REUSE_PREFIX, bucket, steps)
        return None

    def _cover(self, situation: Situation, behind: _Offer | None) -> _Offer:
        """Nothing ends in time: what the robot does instead, and what is computed behind it.

        behind: what fits the time in which a late result is of use.
        """
        rung = situation.cover
        if behind is not None:
            return replace(behind, rung=rung)
        if not situation.has_frame or max(situation.slack_ms, situation.useful_ms) <= 0:
            return _Offer(rung)
        return _Offer(rung, self._floor_and_top(situation)[0], self.config.steps[0])

    def _rise(
        self, state: ControllerState, fits: int, floor: int, top: int, slack_ms: float
    ) -> tuple[int, int]:
        """Level and room: down to `fits` at once, up by one after enough ticks with room."""
        if state.level is None or fits < state.level:
            return fits, 0
        level = max(state.level, floor)
        if level == top:
            return level, 0
        needed_ms = self._needed_ms(state, level + 1, self.config.steps[-1])
        room = state.room + 1 if needed_ms * (1 + self.config.rise_room) <= slack_ms else 0
        return (level + 1, 0) if room >= self.config.rise_after else (level, room)

    def _needed_ms(self, state: ControllerState, bucket: int, steps: int) -> float:
        return self.model.predict_ms(state.latency, bucket, steps, Point.ENCODE)

    def _largest(
        self, state: ControllerState, low: int, high: int, steps: int, slack_ms: float
    ) -> int | None:
        """The largest bucket of low..high that fits."""
        fitting = (
            b for b in range(high, low - 1, -1) if self._needed_ms(state, b, steps) <= slack_ms
        )
        return next(fitting, None)

    def _position(self, tokens: int) -> int:
        """The smallest bucket that holds `tokens`, or the largest there is."""
        buckets = self.model.buckets
        return min(bisect_left(buckets, tokens), len(buckets) - 1)

    def _floor_and_top(self, situation: Situation) -> tuple[int, int]:
        """Positions of the smallest bucket that is good enough and the largest that can be filled.

        With fewer tokens than the smallest bucket, that bucket is both.
        """
        buckets = self.model.buckets
        top = len(buckets) - 1
        if situation.tokens is not None:
            top = max(0, bisect_right(buckets, situation.tokens) - 1)
        return min(self._position(self.config.floor_tokens), top), top

    def _rung(self, situation: Situation, bucket: int, steps: int) -> Rung:
        """What a new prefix in time amounts to."""
        floor, top = self._floor_and_top(situation)
        if bucket < floor:
            return Rung.BELOW_FLOOR
        if steps < self.config.steps[-1]:
            return Rung.FEWER_STEPS
        return Rung.FULL if bucket == top else Rung.SMALLER_BUCKET

    def _decision(
        self, state: ControllerState, situation: Situation, offer: _Offer, point: Point
    ) -> Decision:
        rung, bucket, steps = offer.rung, offer.bucket, offer.steps
        runs = steps > 0
        floor, top = self._floor_and_top(situation)
        model, slack_ms = self.model, situation.slack_ms
        tokens = model.buckets[bucket] if runs else 0
        needed_ms = 0.0
        if runs:
            from_prefix = point is Point.PREFILL or rung is Rung.REUSE_PREFIX
            start = Point.PREFILL if from_prefix else Point.ENCODE
            needed_ms = model.predict_ms(state.latency, bucket, steps, start)
        gave_up = []
        if runs and bucket < top and rung is not Rung.REUSE_PREFIX:
            gave_up.append(f"{model.buckets[top] - tokens} of {model.buckets[top]} tokens")
        if runs and steps < self.config.steps[-1]:
            gave_up.append(f"{self.config.steps[-1] - steps} of {self.config.steps[-1]} steps")
        if runs and bucket < floor:
            gave_up.append(f"the floor of {self.config.floor_tokens} tokens")
        if rung in _GIVES_UP:
            gave_up.append(_GIVES_UP[rung])
        return Decision(
            rung=rung,
            tokens=tokens,
            steps=steps,
            predicted_ms=needed_ms,
            slack_ms=slack_ms,
            point="encode" if point is Point.ENCODE else "prefill",
            late=needed_ms > slack_ms and runs,
            if_late=Rung.STOP if rung is Rung.STOP else situation.cover,
            floor_broken=runs and bucket < floor,
            gave_up=tuple(gave_up),
            why=self._why(state, situation, offer, needed_ms),
            source=model.source,
            epoch=state.epoch,
        )

    def _why(
        self, state: ControllerState, situation: Situation, offer: _Offer, needed_ms: float
    ) -> str:
        if offer.rung is Rung.STOP:
            return f"{state.misses} ticks in a row without a new action in time"
        if offer.steps:
            verdict = "fit" if needed_ms <= situation.slack_ms else "do not fit"
            work = f"{self.model.buckets[offer.bucket]} tokens and {offer.steps} steps"
            return f"{work} need {needed_ms:.1f} ms and {verdict} {situation.slack_ms:.1f} ms"
        if not situation.has_frame:
            return "there is no new frame"
        return f"the deadline passed {-situation.slack_ms:.1f} ms before the encoder was done"


_GIVES_UP = {
    Rung.REUSE_PREFIX: "a new look",
    Rung.CHUNK_TAIL: "a new action in time",
    Rung.HOLD: "motion until the next action",
    Rung.STOP: "the rest of the episode",
}
