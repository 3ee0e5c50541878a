"""A point that must follow a moving light, and a policy that sees it. No physics, no GL."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from policies.vla.base import PolicySpec, Prefix, Scene, VLAPolicy
from sims.base import Environment, EnvironmentSpec, StepResult
from stream.budgets.latency_card import LatencyCard, StageTiming
from stream.data import ActionChunk, Budget, Observation, PatchGrid
from stream.errors import ValueShapeError
from stream.memory import Memory
from stream.plan import Plan

CAMERAS = ("top", "back")
SIDE = 16
GRID = PatchGrid(len(CAMERAS), SIDE, SIDE)
BUCKETS = (32, 128, 512)
DT_S = 0.0125
SPEED = 0.04
NEAR = 0.2


class ToyWorld(Environment):
    """A light walks a circle; the point should stay within NEAR of it. Actions: dx, dy, grip.

    speed: of the light, radians a step. dark: steps at which both cameras give nothing; half: at
    which "back" gives nothing; numb: at which the state is NaN.
    """

    def __init__(
        self,
        speed: float = 0.02,
        max_steps: int = 120,
        dark: Container[int] = (),
        half: Container[int] = (),
        numb: Container[int] = (),
    ) -> None:
        self.speed, self.max_steps = speed, max_steps
        self.dark, self.half, self.numb = dark, half, numb
        self.actions: list[NDArray[np.float32]] = []

    @property
    def spec(self) -> EnvironmentSpec:
        return EnvironmentSpec(
            "toy:follow",
            DT_S,
            dict.fromkeys(CAMERAS, (SIDE, SIDE)),
            state_size=2,
            action_low=(-SPEED, -SPEED, -1.0),
            action_high=(SPEED, SPEED, 1.0),
            max_steps=self.max_steps,
            moving=self.speed > 0,
        )

    def reset(self, seed: int) -> str:
        self.steps = self.near = 0
        self.phase = float(np.random.default_rng(seed).uniform(0, 2 * np.pi))
        self.point = np.zeros(2, np.float32)
        self.actions = []
        return "follow the light"

    @property
    def light(self) -> NDArray[np.float32]:
        angle = self.phase + self.speed * self.steps
        return np.array([0.7 * np.cos(angle), 0.7 * np.sin(angle)], np.float32)

    def observe(self) -> Observation:
        image = np.full((SIDE, SIDE, 3), 40, np.uint8)
        x, y = _cell(self.light)
        image[y, x] = 255
        images = dict.fromkeys(CAMERAS, None if self.steps in self.dark else image)
        if self.steps in self.half:
            images["back"] = None
        state = np.full(2, np.nan, np.float32) if self.steps in self.numb else self.point.copy()
        return Observation(images, state, "follow the light", self.steps * DT_S)

    def step(self, action: NDArray[np.float32]) -> StepResult:
        self.actions.append(action)
        self.point = self.point + np.clip(action[:2], -SPEED, SPEED)
        self.steps += 1
        self.near += bool(np.linalg.norm(self.point - self.light) < NEAR)
        done = self.steps >= self.max_steps
        score = self.near / self.steps
        return StepResult(success=done and score > 0.5, done=done, score=score)

    def hold(self, last: NDArray[np.float32] | None) -> NDArray[np.float32]:
        grip = -1.0 if last is None else last[2]
        return np.array([0, 0, grip], np.float32)

    def expert(self) -> NDArray[np.float32]:
        return _towards(self.light - self.point, 1)[0]

    def close(self) -> None:
        self.closed = True


class ToyPolicy(VLAPolicy):
    """Goes to the brightest token it kept; keeps scattered ones and those around the last light.

    broken: calls of `act`, 0-based, that give NaN.
    """

    device = torch.device("cpu")

    def __init__(self, steps: tuple[int, ...] = (1,), broken: Container[int] = ()) -> None:
        self.steps, self.broken = steps, broken
        self.calls: list[tuple[str, Any]] = []

    @property
    def spec(self) -> PolicySpec:
        return PolicySpec(
            "toy-vla",
            CAMERAS,
            GRID,
            chunk=8,
            execute=8,
            action_size=3,
            state_size=2,
            dt_s=DT_S,
            steps=self.steps,
        )

    def encode(self, observation: Observation) -> Scene:
        seen = {c: i for c, i in observation.images.items() if i is not None}
        if not seen:
            raise ValueShapeError("No camera gave a picture.")
        x = torch.from_numpy(np.stack(list(seen.values()))).float()[..., :1].reshape(-1, 1) / 255
        grid = PatchGrid(len(seen), SIDE, SIDE)
        self.calls.append(("encode", len(seen)))
        return Scene(x, grid, tuple(seen), observation, {})

    def prefill(self, scene: Scene, budget: Budget, memory: Memory, epoch: int = 0) -> Prefix:
        n = scene.x.shape[0]
        order = [i * 37 % n for i in range(n)]
        last = memory.state.get("toy")
        if last is not None:
            order = [last + dy * SIDE + dx for dy in (0, -1, 1) for dx in (0, -1, 1)] + order
        keep = list(dict.fromkeys(i for i in order if 0 <= i < n))[: budget.tokens]
        plan = Plan.keep(torch.tensor(sorted(keep)), n)
        memory.tick += 1
        self.calls.append(("prefill", budget.tokens))
        time_s = scene.observation.time_s
        kept = plan.apply(scene.x)
        places = torch.arange(n)
        return Prefix(plan, scene.grid, scene.cameras, places, plan.k, kept, time_s, epoch)

    def act(
        self, prefix: Prefix, observation: Observation, steps: int | None = None, seed: int = 0
    ) -> tuple[ActionChunk, Tensor]:
        self.calls.append(("act", steps))
        acts = sum(name == "act" for name, _ in self.calls)
        place = int(prefix.plan.anchor[prefix.cache[:, 0].argmax()])
        attention = torch.zeros(prefix.grid.size)
        attention[prefix.plan.anchor] = prefix.cache[:, 0]
        actions = np.zeros((8, 3), np.float32)
        if prefix.cache.max() > 0.5:
            y, x = divmod(place % GRID.per_frame, SIDE)
            light = (np.array([x, y], np.float32) + 0.5) / SIDE * 2 - 1
            actions = _towards(light - observation.state, 8)
        if acts - 1 in self.broken:
            actions = actions * np.nan
        return ActionChunk(actions, prefix.observed_s), attention

    def remember(self, prefix: Prefix, attention: Tensor, memory: Memory) -> None:
        if attention.max() > 0.5:
            memory.state["toy"] = int(attention.argmax())


def _cell(place: NDArray[np.float32]) -> tuple[int, int]:
    x, y = ((place + 1) / 2 * SIDE).clip(0, SIDE - 1).astype(int)
    return int(x), int(y)


def _towards(gap: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """float32 [count, 3]: moves that close the gap as fast as allowed, with a closed grip."""
    actions = np.ones((count, 3), np.float32)
    for i in range(count):
        actions[i, :2] = np.clip(gap, -SPEED, SPEED)
        gap = gap - actions[i, :2]
    return actions


def toy_card(
    encode_ms: float = 10,
    base_ms: float = 8,
    token_ms: float = 0.2,
    act_ms: float = 2,
    spread: float = 0.0,
    device: str = "toy device",
) -> LatencyCard:
    """A device whose prefill grows with the tokens; `spread`: of the log of a sample."""
    noise = np.exp(spread * np.random.default_rng(0).normal(size=200))
    rows = [
        StageTiming.of(stage, bucket, ms * noise)
        for bucket in BUCKETS
        for stage, ms in (
            ("encode", encode_ms),
            ("prefill", base_ms + token_ms * bucket),
            ("act", act_ms),
        )
    ]
    return LatencyCard(
        model="toy-vla",
        device=device,
        threads=1,
        dtype="float32",
        date="2026-11-24",
        shapes={"visual_tokens": (512,)},
        warmup=0,
        seed=0,
        timings=tuple(rows),
    )
