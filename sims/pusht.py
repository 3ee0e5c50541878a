"""gym-pusht as an environment: push a T onto its outline. Needs no GL.

Driven at 10 Hz by absolute targets of the pusher in a square of 512 units.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stream.data import Observation
from stream.errors import SimulatorError

from .base import Environment, EnvironmentSpec, StepResult

DT_S = 0.1
MAX_STEPS = 300


class PushT(Environment):
    """One camera from above, 'top'. The state is the pusher's position (2), not the T's.

    Success: the T covers more than 95 % of its outline. score: the share covered now.
    """

    def __init__(self, pixels: int = 128) -> None:
        try:
            from gym_pusht.envs.pusht import PushTEnv
        except ImportError as error:
            raise SimulatorError(f"gym-pusht cannot be loaded ({error}): uv sync") from error
        self._raw = PushTEnv(
            obs_type="pixels_agent_pos", observation_width=pixels, observation_height=pixels
        )
        self._spec = EnvironmentSpec(
            name="pusht",
            dt_s=DT_S,
            cameras={"top": (pixels, pixels)},
            state_size=2,
            action_low=(0.0, 0.0),
            action_high=(512.0, 512.0),
            max_steps=MAX_STEPS,
        )
        self._steps = 0

    @property
    def spec(self) -> EnvironmentSpec:
        return self._spec

    def reset(self, seed: int) -> str:
        self._raw.reset(seed=seed)
        self._steps = 0
        return "push the T onto its outline"

    def observe(self) -> Observation:
        seen = self._raw.get_obs()
        return Observation(
            images={"top": seen["pixels"]},
            state=seen["agent_pos"].astype(np.float32),
            instruction="push the T onto its outline",
            time_s=self._steps * DT_S,
        )

    def step(self, action: NDArray[np.float32]) -> StepResult:
        self._steps += 1
        target = np.clip(action, self._spec.action_low, self._spec.action_high)
        info = self._raw.step(target.astype(np.float64))[4]
        success = bool(info["is_success"])
        return StepResult(success, success or self._steps >= MAX_STEPS, float(info["coverage"]))

    def hold(self, last: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """The last target; before the first one, the place where the pusher is."""
        return np.array(self._raw.agent.position if last is None else last, dtype=np.float32)

    def expert(self) -> NDArray[np.float32]:
        raise SimulatorError(
            "PushT has no scripted expert. Record demonstrations on a metaworld task, or bring "
            "PushT demonstrations as a LeRobotDataset."
        )

    def close(self) -> None:
        self._raw.close()
