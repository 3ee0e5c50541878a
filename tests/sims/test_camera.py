"""A simulator episode as a camera."""

from __future__ import annotations

import time

import numpy as np
import pytest
from numpy.typing import NDArray

from sims import camera
from stream.errors import FoveateError

from .toys import DT_S, ToyWorld


class Played(ToyWorld):
    def expert(self) -> NDArray[np.float32]:
        return np.zeros(3, np.float32)


def test_the_world_goes_on_while_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, world = [5.0], Played(max_steps=40)
    monkeypatch.setattr(camera, "make", lambda name: world)
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    seen = camera.open_camera("toy")
    first = seen.read()
    assert first is not None
    assert first.dtype == np.uint8
    now_s[0] += 10.5 * DT_S
    later = seen.read()
    assert later is not None
    assert world.steps == 10
    assert not np.array_equal(first, later)
    now_s[0] = 1e3
    assert seen.read() is not None
    assert world.steps == 40
    assert seen.read() is None
    seen.close()


def test_an_unknown_episode_is_said() -> None:
    with pytest.raises(FoveateError, match="nowhere"):
        camera.open_camera("nowhere:nothing")
