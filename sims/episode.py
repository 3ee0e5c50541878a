"""One episode in virtual time: the world goes on while the policy computes.

At each observation the policy is run at once, in program order, and its time is added up on the
episode's own clock. Then the world is stepped for as long as that took, with what the robot had:
the rest of the last chunk, then the environment's hold. Only then the result is delivered.

An inference begins early enough that, if it takes the whole budget, the actions that are meant to
be executed of the last chunk are done when it ends; and at once when the robot stands. Where the
last one took longer than a chunk lasts, nothing would be left of a chunk that was begun early, so
the robot goes to the end of what it has and stands while it thinks.

Which actions of a chunk are past when it comes: those the robot made since the observation, from
the chunk before. A hold is no move, so a robot that stood still begins at the start of its chunk
(`align="moves"`); with `align="time"` whatever was meant for a time gone by is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from policies.vla.base import PolicySpec, Prefix, Scene, VLAPolicy
from stream.budgets.deadlines import ActionQueue, Deadline, Deadlines
from stream.budgets.decision import Controller, Decision, Outcome, Rung, Situation
from stream.config import Config
from stream.data import ActionChunk, Budget, Observation
from stream.errors import AttachError, SignalError, ValueShapeError
from stream.memory import Memory
from stream.ticks import Tick

from .base import Environment, EnvironmentSpec, StepResult
from .clock import ENCODE, Floats, Mode, Playback, TimeSource, periods


class DriveConfig(Config):
    """How an episode is driven.

    mode: whether the world waits while the policy computes.
    budget_ms: from the observation to the actions; None leaves it to the action queue.
    align: which actions of a chunk count as past; see above.
    stop_after: looks in a row that gave no action before the episode is given up. A controller may
        give up earlier.
    """

    mode: Mode = "realtime"
    budget_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    align: Literal["moves", "time"] = "moves"
    stop_after: Annotated[int, Field(ge=1)] = 80


@dataclass(slots=True)
class Thought:
    """An inference: what was decided and computed from one observation.

    playback: what the robot had when it observed. useful_ms: until when a result is of any use.
    """

    epoch: int
    playback: Playback
    deadline: Deadline
    useful_ms: float
    observation: Observation | None
    decision: Decision
    promised: bool
    predicted_ms: float | None
    stage_ms: dict[str, float]
    said: list[str]
    prefix: Prefix | None = None
    chunk: ActionChunk | None = None
    attention: Tensor | None = None

    @property
    def elapsed_ms(self) -> float:
        return sum(self.stage_ms.values())

    @property
    def late(self) -> bool:
        """No result by the deadline."""
        return self.chunk is None or self.elapsed_ms > self.deadline.limit_ms

    def outcome(self) -> Outcome:
        """What the controller learns: the time after its decision, and whether it was of use."""
        after = {stage: ms for stage, ms in self.stage_ms.items() if stage != ENCODE}
        useless = self.chunk is None or self.elapsed_ms > self.useful_ms
        return Outcome(after, sum(after.values()), useless)


class Episode[S]:
    """The loop of one robot. Several may share a policy; nothing of one reaches another.

    film: observe before every control period, for sinks that want to see each of them.

    Raises AttachError where policy and environment do not fit.
    """

    def __init__(
        self,
        environment: Environment,
        policy: VLAPolicy,
        controller: Controller[S],
        clock: TimeSource,
        config: DriveConfig,
        film: bool = False,
    ) -> None:
        self.environment, self.policy, self.controller = environment, policy, controller
        self.clock, self.config, self.film = clock, config, film
        check_fit(policy.spec, environment.spec)
        self._dt_s, execute = environment.spec.dt_s, policy.spec.execute
        self._deadlines = Deadlines(
            budget_ms=config.budget_ms, cold_ms=config.budget_ms, dt_s=self._dt_s
        )
        self._waits = config.mode == "waiting"
        self._useful_ms = config.budget_ms or math.inf
        lead_ms = 0.0 if self._waits else min(self._useful_ms, execute * self._dt_s * 1000)
        self._begin_at = max(0, execute - periods(lead_ms, self._dt_s))
        self._control = controller.start()
        self.epoch = -1

    def reset(self, seed: int) -> None:
        """Begin an episode. An inference still on its way belongs to the one before."""
        if self.epoch >= 0:
            self._control = self.controller.reset(self._control)
        self.epoch += 1
        self.instruction = self.environment.reset(seed)
        self.stopped = ""
        self._seed, self._ticks, self._idle, self._took_ms = seed, 0, 0, 0.0
        self._playback = Playback.empty(self.environment.spec.action_size)
        self._memory = Memory(seed=seed)
        self._prefix: Prefix | None = None
        self._levels = np.random.default_rng(seed)
        self._result = StepResult(success=False, done=False, score=0.0)

    @property
    def steps(self) -> int:
        """Control periods so far."""
        return self._playback.steps

    @property
    def over(self) -> bool:
        out_of_time = self.steps >= self.environment.spec.max_steps
        return self._result.done or bool(self.stopped) or out_of_time

    def run(self, seed: int) -> Iterator[Tick]:
        """A whole episode, tick by tick."""
        self.reset(seed)
        while not self.over:
            yield self.go_on(self.think())

    def think(self) -> Thought:
        """Observe, decide, compute. The world is not stepped."""
        left = 0 if self._waits else self._playback.left
        deadline = self._deadlines.of(ActionQueue(left, started=left > 0))
        levels = self._levels.random(3).tolist()
        observation, scene, said = None, None, []
        stage_ms: dict[str, float] = {}
        try:
            observation = self.environment.observe()
            if any(image is not None for image in observation.images.values()):
                scene, stage_ms[ENCODE] = self.clock.run(
                    ENCODE,
                    self.policy.spec.grid.size,
                    1,
                    levels[0],
                    partial(self.policy.encode, observation),
                )
        except (ValueShapeError, SignalError) as error:
            said.append(str(error))
        situation = self._situation(observation, scene, deadline, sum(stage_ms.values()))
        self._control, decision = self.controller.decide(self._control, situation)
        thought = Thought(
            epoch=self.epoch,
            playback=self._playback,
            deadline=deadline,
            useful_ms=self._useful_ms,
            observation=observation,
            decision=decision,
            promised=decision.runs and not decision.late,
            predicted_ms=_total(decision.predicted_ms, stage_ms),
            stage_ms=stage_ms,
            said=said,
            prefix=self._prefix,
        )
        if decision.runs and observation is not None:
            try:
                self._compute(thought, observation, scene, situation, levels)
            except (ValueShapeError, SignalError) as error:
                said.append(str(error))
        return thought

    def go_on(self, thought: Thought) -> Tick:
        """Let the world go on while that was computed, take the result, go on to the next look."""
        first, number = self._playback, self._ticks
        executed: list[Floats] = []
        seen: list[Observation | None] = []
        current = thought.epoch == self.epoch
        if current:
            busy = 0 if self._waits else periods(thought.elapsed_ms, self._dt_s)
            while not self.over and len(executed) < busy:
                self._step(executed, seen)
        skipped = self._deliver(thought)
        if current:
            while not self.over and (not executed or self._has_time):
                self._step(executed, seen)
            self._ticks += 1
            self._idle = 0 if thought.chunk is not None else self._idle + 1
            if thought.decision.rung is Rung.STOP:
                self.stopped = thought.decision.why
            elif self._idle >= self.config.stop_after:
                self.stopped = f"{self._idle} looks in a row gave no action"
        decision, prefix = thought.decision, thought.prefix if thought.chunk is not None else None
        return Tick(
            number=number,
            epoch=thought.epoch,
            first_step=first.steps,
            time_s=first.steps * self._dt_s,
            instruction=self.instruction,
            observation=thought.observation,
            cameras=prefix.cameras if prefix else (),
            grid=prefix.grid if prefix else None,
            plan=prefix.plan if prefix else None,
            deadline_ms=thought.deadline.limit_ms,
            rule=thought.deadline.rule.value,
            decision=decision,
            promised=thought.promised,
            predicted_ms=thought.predicted_ms,
            stage_ms=thought.stage_ms,
            elapsed_ms=thought.elapsed_ms,
            late=thought.late,
            got=decision.if_late if thought.late else decision.rung,
            chunk=thought.chunk,
            skipped=skipped,
            executed=np.stack(executed) if executed else first.chunk[:0],
            held=self._playback.holds - first.holds if current else 0,
            attention=thought.attention,
            seen=tuple(seen),
            said=tuple(thought.said),
            success=self._result.success,
            score=self._result.score,
        )

    @property
    def _has_time(self) -> bool:
        """Whether the next look can wait for another action."""
        if self._waits or periods(self._took_ms, self._dt_s) < len(self._playback.chunk):
            return self._playback.left > 0 and self._playback.position < self._begin_at
        return self._playback.left > 0

    def _step(self, executed: list[Floats], seen: list[Observation | None]) -> None:
        if self.film:
            try:
                seen.append(self.environment.observe())
            except ValueShapeError:
                seen.append(None)
        self._playback, action = self._playback.next(self.environment.hold)
        self._result = self.environment.step(action)
        executed.append(action)

    def _situation(
        self,
        observation: Observation | None,
        scene: Scene | None,
        deadline: Deadline,
        elapsed_ms: float,
    ) -> Situation:
        prefix = self._prefix
        if observation is None or prefix is None:
            tokens, age_s = 0, 0.0
        else:
            tokens, age_s = prefix.tokens, max(0.0, observation.time_s - prefix.observed_s)
        gone = 0 if self._waits else periods(elapsed_ms, self._dt_s)
        return Situation(
            slack_ms=deadline.slack_ms(elapsed_ms),
            useful_ms=self._useful_ms - elapsed_ms,
            tokens=None if scene is None else scene.x.shape[0],
            has_frame=scene is not None,
            actions_left=max(0, self._playback.left - gone),
            prefix_tokens=tokens,
            prefix_age_s=age_s,
        )

    def _compute(
        self,
        thought: Thought,
        observation: Observation,
        scene: Scene | None,
        situation: Situation,
        levels: list[float],
    ) -> None:
        """Prefill, the second decision, actions; or actions from the old prefix."""
        policy, memory, control = self.policy, self._memory, self._control
        decision, seed = thought.decision, self._seed + self._ticks
        if decision.prefills and scene is not None:
            budget = Budget(min(decision.tokens, scene.x.shape[0]), thought.deadline.limit_ms)
            thought.prefix, ms = self.clock.run(
                "prefill",
                decision.tokens,
                1,
                levels[1],
                partial(policy.prefill, scene, budget, memory, thought.epoch),
            )
            thought.stage_ms["prefill"] = ms
            later = replace(
                situation,
                slack_ms=situation.slack_ms - ms,
                useful_ms=situation.useful_ms - ms,
            )
            thought.decision = decision = self.controller.refine(control, decision, later)
        if (prefix := thought.prefix) is None:
            return

        def act() -> tuple[ActionChunk, Tensor]:
            chunk, attention = policy.act(prefix, observation, decision.steps, seed)
            if decision.prefills:
                policy.remember(prefix, attention, memory)
            return chunk, attention

        (thought.chunk, thought.attention), thought.stage_ms["act"] = self.clock.run(
            "act", decision.tokens, decision.steps, levels[2], act
        )

    def _deliver(self, thought: Thought) -> int:
        """Take the result in; returns how many of its actions were past.

        The result of an older episode teaches how long things take, and nothing else.
        """
        if thought.decision.runs:
            self._control = self.controller.observe(
                self._control, thought.decision, thought.outcome()
            )
        if thought.epoch != self.epoch or thought.chunk is None:
            return 0
        self._prefix, self._took_ms = thought.prefix, thought.elapsed_ms
        before, now = thought.playback, self._playback
        past = now.moves - before.moves
        if self.config.align == "time":
            past = now.steps - before.steps
        self._playback = now.deliver(thought.chunk.actions, past)
        return past


def _total(predicted_ms: float | None, before_ms: dict[str, float]) -> float | None:
    return None if predicted_ms is None else predicted_ms + sum(before_ms.values())


def check_fit(policy: PolicySpec, world: EnvironmentSpec) -> None:
    """Raise AttachError unless the policy was made for such a robot."""
    unknown = [camera for camera in policy.cameras if camera not in world.cameras]
    if unknown:
        raise AttachError(
            f"{policy.name} looks through {', '.join(policy.cameras)}; {world.name} has "
            f"{', '.join(world.cameras)}."
        )
    pairs = {
        "numbers in the state": (policy.state_size or world.state_size, world.state_size),
        "numbers in an action": (policy.action_size, world.action_size),
        "seconds between actions": (policy.dt_s, world.dt_s),
    }
    for what, (wanted, given) in pairs.items():
        if not math.isclose(wanted, given, rel_tol=1e-6):
            raise AttachError(
                f"{policy.name} was made for {wanted:g} {what}; {world.name} has {given:g}."
            )
