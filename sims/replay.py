"""Counterfactuals: what another budget would have made of an episode's observations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.vla.base import PolicySpec, VLAPolicy
from stream.budgets.decision import Controller
from stream.data import Observation
from stream.errors import ValueShapeError
from stream.plan import Plan
from stream.sinks.jsonl import Recording

from .base import Environment, EnvironmentSpec, StepResult
from .clock import TimeSource
from .episode import DriveConfig, Episode


class RecordedWorld(Environment):
    """Shows the observations of a recording in their order; actions change nothing."""

    def __init__(self, recording: Recording, policy: PolicySpec) -> None:
        self._recording = recording
        self._tick: dict[str, Any] = {}
        about = recording.about
        self._spec = EnvironmentSpec(
            name=about["environment"],
            dt_s=about["dt_s"],
            cameras=about["cameras"],
            state_size=policy.state_size,
            action_low=(-math.inf,) * policy.action_size,
            action_high=(math.inf,) * policy.action_size,
            max_steps=1 << 40,
        )

    def show(self, tick: dict[str, Any]) -> None:
        self._tick = tick

    @property
    def spec(self) -> EnvironmentSpec:
        return self._spec

    def reset(self, seed: int) -> str:
        return str(self._recording.ticks[0]["instruction"]) if self._recording.ticks else ""

    def observe(self) -> Observation:
        observation = self._recording.observation(self._tick)
        if observation is None:
            raise ValueShapeError("The recorded sensors gave nothing usable at this tick.")
        return observation

    def step(self, action: NDArray[np.float32]) -> StepResult:
        return StepResult(success=False, done=False, score=0.0)

    def hold(self, last: NDArray[np.float32] | None) -> NDArray[np.float32]:
        return np.zeros(self._spec.action_size, np.float32) if last is None else last

    def expert(self) -> NDArray[np.float32]:
        raise ValueShapeError("A recording has no expert.")

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Change:
    """One tick, then and now.

    tokens_then, tokens_now: 0 where nothing was computed. action_l2: mean distance of the actions
    that are meant to be executed, in the environment's units; None unless both computed some.
    overlap: share of the smaller kept set that the other one holds; None unless both kept some.
    """

    tick: int
    time_s: float
    tokens_then: int
    tokens_now: int
    rung_now: str
    took_ms: float
    action_l2: float | None
    overlap: float | None


def replay[S](
    recording: Recording,
    policy: VLAPolicy,
    controller: Controller[S],
    clock: TimeSource,
    budget_ms: float | None,
) -> Iterator[Change]:
    """Run every recorded observation again, in a world that waits, with a memory of its own."""
    execute = policy.spec.execute
    world = RecordedWorld(recording, policy.spec)
    config = DriveConfig(mode="waiting", budget_ms=budget_ms, stop_after=1 << 30)
    episode = Episode(world, policy, controller, clock, config)
    episode.reset(recording.about["seed"])
    for then in recording.ticks:
        world.show(then)
        now = episode.go_on(episode.think())
        distance = None
        if then["actions"] is not None and now.chunk is not None:
            before = np.asarray(then["actions"], np.float32)[:execute]
            distance = np.linalg.norm(now.chunk.actions[:execute] - before, axis=1).mean()
        plan = None if then["plan"] is None else Plan.from_record(then["plan"])
        yield Change(
            tick=then["tick"],
            time_s=then["time_s"],
            tokens_then=then["decision"]["tokens"],
            tokens_now=now.decision.tokens,
            rung_now=now.decision.rung.name,
            took_ms=now.elapsed_ms,
            action_l2=None if distance is None else float(distance),
            overlap=None if plan is None or now.plan is None else overlap(plan, now.plan),
        )


def overlap(one: Plan, other: Plan) -> float | None:
    """Share of the smaller set of anchors that the other plan has too; of the same tokens.

    None where the plans are over different tokens, as when a camera dropped out in between.
    """
    if one.n != other.n or min(one.k, other.k) == 0:
        return None
    ours = np.intersect1d(one.anchor.numpy(force=True), other.anchor.numpy(force=True))
    return len(ours) / min(one.k, other.k)
