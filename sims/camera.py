"""A simulator episode as a camera: `sim:metaworld:drawer-open`, played by its scripted expert."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from . import make


class EpisodeCamera:
    """The first camera of an environment whose time is the wall's from the first look on.

    The expert acts meanwhile: the world is stepped to the moment it is looked at. The end of the
    episode is seen, then no more.
    """

    def __init__(self, name: str, seed: int = 0) -> None:
        self._world = make(name)
        self._world.reset(seed)
        self._began_s: float | None = None
        self._steps, self._done = 0, False

    def read(self) -> NDArray[np.uint8] | None:
        if self._done:
            return None
        if self._began_s is None:
            self._began_s = time.monotonic()
        spec = self._world.spec
        until = int((time.monotonic() - self._began_s) / spec.dt_s)
        while self._steps < until and not self._done:
            result = self._world.step(self._world.expert())
            self._steps += 1
            self._done = result.done or self._steps >= spec.max_steps
        return next(image for image in self._world.observe().images.values() if image is not None)

    def close(self) -> None:
        self._world.close()


def open_camera(name: str) -> EpisodeCamera:
    """name: of an environment. Raises what `sims.make` raises."""
    return EpisodeCamera(name)
