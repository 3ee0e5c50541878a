"""Where clutter lies."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from sims.clutter import CLEAR, strewn
from sims.scenes import GOAL_COLORS, Point, to_segment

PATH = [np.array([0.0, 0.6, 0.2]), np.array([0.05, 0.65, 0.02]), np.array([-0.1, 0.85, 0.03])]
OTHERS = [np.array([0.15, 0.8, 0.03])]


@pytest.mark.parametrize("others", [OTHERS, []])
def test_it_lies_beside_the_way_and_beside_what_must_be_seen(others: Sequence[Point]) -> None:
    things = strewn(np.random.default_rng(0), 50, PATH, others)
    assert len(things) == 50
    for thing in things:
        ways = [*pairwise(PATH), *((point, point) for point in others)]
        assert min(to_segment(thing.position, *way) for way in ways) >= CLEAR
        assert thing.position[2] <= 0.02  # on the table
    assert {thing.kind for thing in things} == {"box", "cylinder", "sphere"}
    assert not {thing.rgb for thing in things} & set(GOAL_COLORS.values())


def test_it_depends_on_the_generator_alone() -> None:
    first, again, other = (strewn(np.random.default_rng(s), 8, PATH, OTHERS) for s in (1, 1, 2))
    places = [np.array([thing.position for thing in things]) for things in (first, again, other)]
    np.testing.assert_array_equal(places[0], places[1])
    assert not np.array_equal(places[0], places[2])


def test_none_is_none() -> None:
    assert strewn(np.random.default_rng(0), 0, PATH, []) == []
