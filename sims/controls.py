"""Controls: what must fail if sight matters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from stream.data import Observation

from .base import Environment, EnvironmentSpec, StepResult

GREY = 128


class Blank(Environment):
    """Another environment seen through grey glass. Does not own it: closing is the other's."""

    def __init__(self, behind: Environment) -> None:
        self._behind = behind

    @property
    def spec(self) -> EnvironmentSpec:
        return self._behind.spec

    def reset(self, seed: int) -> str:
        return self._behind.reset(seed)

    def observe(self) -> Observation:
        seen = self._behind.observe()
        grey = {
            camera: None if image is None else np.full_like(image, GREY)
            for camera, image in seen.images.items()
        }
        return replace(seen, images=grey)

    def step(self, action: NDArray[np.float32]) -> StepResult:
        return self._behind.step(action)

    def hold(self, last: NDArray[np.float32] | None) -> NDArray[np.float32]:
        return self._behind.hold(last)

    def expert(self) -> NDArray[np.float32]:
        return self._behind.expert()

    def close(self) -> None:
        pass
