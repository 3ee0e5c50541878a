"""Where hand, object and goal are seen, for training."""

from __future__ import annotations

import numpy as np
import pytest

import sims
from sims.scenes import GOAL_COLORS

pytestmark = pytest.mark.usefixtures("pictures")


def test_the_goal_of_the_instruction_is_where_its_colour_is() -> None:
    hits = 0
    with sims.make("metaworld:push") as env:
        for seed in range(6):
            said = env.reset(seed)
            color = next(c for c in GOAL_COLORS if c in said)
            image = env.observe().images["scene"]
            assert image is not None
            row, col = env.landmarks()[0, 2].astype(int)
            pixel = image[row, col].astype(float)
            wanted = np.array(GOAL_COLORS[color])
            hits += int(pixel.argmax() == wanted.argmax() and pixel.max() > 1.5 * np.median(pixel))
    assert hits == 6


def test_the_puck_is_yellow_in_both_pictures() -> None:
    with sims.make("metaworld:pick-place") as env:
        env.reset(3)
        for _ in range(12):
            env.step(env.expert())
        images = env.observe().images
        for image, (row, col) in zip(images.values(), env.landmarks()[:, 1], strict=True):
            assert image is not None
            red, green, blue = image[int(row), int(col)].astype(int)
            assert min(red, green) > blue + 50


def test_there_is_no_object_to_reach() -> None:
    with sims.make("metaworld:reach") as env:
        env.reset(0)
        marks = env.landmarks()
    assert marks.shape == (2, 3, 2)
    assert np.isnan(marks[:, 1]).all()
    assert np.isfinite(marks[0, [0, 2]]).all()
