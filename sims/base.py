"""What an environment is: a world that stands still unless it is stepped."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stream.closing import Closing
from stream.data import Observation


@dataclass(frozen=True, slots=True)
class EnvironmentSpec:
    """Facts of an environment.

    dt_s: control period. cameras: names with pixels (height, width). max_steps: after which an
    episode ends unsolved. moving: whether the world changes while the robot stands still.
    """

    name: str
    dt_s: float
    cameras: dict[str, tuple[int, int]]
    state_size: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    max_steps: int
    moving: bool = False

    @property
    def action_size(self) -> int:
        return len(self.action_low)


@dataclass(frozen=True, slots=True)
class StepResult:
    """success: whether the task counts as solved now. done: whether the episode has ended.

    score: progress in [0, 1] where the environment measures one; for tracking tasks the share of
    time on target so far.
    """

    success: bool
    done: bool
    score: float


class Environment(Closing):
    """One simulator instance."""

    @property
    @abstractmethod
    def spec(self) -> EnvironmentSpec: ...

    @abstractmethod
    def reset(self, seed: int) -> str:
        """Begin an episode that depends on the seed alone; returns the instruction."""

    @abstractmethod
    def observe(self) -> Observation:
        """Render the cameras and read the state; changes nothing, and costs nothing if unused."""

    @abstractmethod
    def step(self, action: NDArray[np.float32]) -> StepResult:
        """Advance by one control period. action [a], clipped to the limits of the spec."""

    @abstractmethod
    def hold(self, last: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """The action that keeps the robot where it is, given the last one executed.

        Zero motion with the last gripper command for an arm driven by differences, the last target
        for one driven by positions; never plain zeros for an absolute action.
        """

    @abstractmethod
    def expert(self) -> NDArray[np.float32]:
        """What the scripted expert would do now; sees the true state."""

    def landmarks(self) -> NDArray[np.float32]:
        """Where `observe` would show hand, object and goal: float32 [cameras, things, 2], row and
        column in pixels, also behind other things; NaN where there is none. A training aid: no
        policy may see it.
        """
        return np.empty((len(self.spec.cameras), 0, 2), dtype=np.float32)
