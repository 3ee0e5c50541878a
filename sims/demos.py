"""What a scripted expert shows: episodes with its clean actions, disturbed so that it recovers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stream.data import Observation
from stream.errors import ConfigError, SimulatorError

from . import make
from .base import Environment, EnvironmentSpec

FIRST_SEED = 1_000_000
"""Demonstrations use seeds from here on; evaluate with smaller ones, and no episode is seen twice.
"""
PATIENCE = 4
"""Attempts for each wanted episode, after which a task's expert counts as broken."""
LINGER = 8
"""Steps that are recorded after success, so that a policy learns to stay."""


@dataclass(frozen=True, slots=True)
class Noise:
    """How what is executed differs from what the expert wants.

    levels: standard deviations in shares of an action's range to each side, one for each episode in
        turn. burst_rate: chance that a step starts a burst. burst_steps: during which one random
        action is executed instead.
    """

    levels: tuple[float, ...] = (0.0, 0.15, 0.3)
    burst_rate: float = 0.02
    burst_steps: int = 6

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 0 or not 0 <= self.burst_rate <= 1:
            raise ConfigError(f"{self}: levels are 0 or more, burst_rate is in [0, 1].")


CLEAN = Noise(levels=(0.0,), burst_rate=0.0)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What was seen and wanted at each of n steps.

    images: uint8 [n, cameras, height, width, 3] in the order of the spec's cameras. state: float32
    [n, s]. action: float32 [n, a], the expert's clean ones. pixels: float32 [n, cameras, things,
    2], the environment's landmarks.
    """

    instruction: str
    images: NDArray[np.uint8]
    state: NDArray[np.float32]
    action: NDArray[np.float32]
    pixels: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.action)


def common_spec(tasks: Sequence[str]) -> EnvironmentSpec:
    """The spec of the first task; raises ConfigError if the tasks' robots or cameras differ."""
    if not tasks or len(set(tasks)) < len(tasks):
        raise ConfigError(f"Tasks are {list(tasks)}; give at least one, each once.")
    specs = []
    for task in tasks:
        with make(task) as env:
            specs.append(env.spec)
    robots = {(tuple(s.cameras.items()), s.dt_s, s.state_size, s.action_size) for s in specs}
    if len(robots) > 1:
        raise ConfigError(f"{', '.join(tasks)} have different robots; record them apart.")
    return specs[0]


def hopeless(task: str, succeeded: int, tried: int, noise: Noise) -> SimulatorError:
    """The error for an expert that fails too often."""
    return SimulatorError(
        f"The expert of {task} succeeded in {succeeded} of {tried} episodes with {noise}. "
        "Lower the noise, or leave the task out."
    )


def follow(
    env: Environment, seed: int, noise: Noise, before_step: Callable[[NDArray[np.float32]], None]
) -> bool:
    """Let the expert play the episode of this seed; whether it succeeded.

    before_step: called with each clean action, before what is left of it is executed. Episodes of
    noise level 0 have no bursts either: some demonstrations are clean.
    """
    rng = np.random.default_rng([seed, 1])
    level = noise.levels[seed % len(noise.levels)]
    low, high = np.array(env.spec.action_low), np.array(env.spec.action_high)
    env.reset(seed)
    solved = False
    left, bursting, wild = env.spec.max_steps, 0, low
    while left:
        action = env.expert()
        before_step(action)
        if level and not bursting and rng.random() < noise.burst_rate:
            bursting, wild = noise.burst_steps, rng.uniform(low, high)
        noisy = action + level * (high - low) / 2 * rng.standard_normal(len(low))
        result = env.step((wild if bursting else noisy).astype(np.float32))
        bursting = max(0, bursting - 1)
        left -= 1
        if result.success and not solved:
            solved, left = True, min(left, LINGER)
    return solved


def demonstrate(env: Environment, seed: int, noise: Noise = CLEAN) -> Demonstration | None:
    """The expert's episode of this seed with pictures; None if the expert fails."""
    seen: list[Observation] = []
    actions: list[NDArray[np.float32]] = []
    pixels: list[NDArray[np.float32]] = []

    def look(action: NDArray[np.float32]) -> None:
        seen.append(env.observe())
        pixels.append(env.landmarks())
        actions.append(action)

    if not follow(env, seed, noise, look):
        return None
    cameras = env.spec.cameras
    return Demonstration(
        seen[0].instruction,
        np.array([[o.images[camera] for camera in cameras] for o in seen], dtype=np.uint8),
        np.array([o.state for o in seen]),
        np.array(actions),
        np.array(pixels),
    )
