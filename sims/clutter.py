"""Coloured things that lie about on the table, seen by both cameras and touched by nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.random import Generator

from .cameras import Ornament
from .scenes import Point, to_segment

COLORS = (
    (1.0, 0.45, 0.0),
    (1.0, 0.4, 0.7),
    (0.0, 0.75, 0.8),
    (0.95, 0.95, 0.95),
    (0.35, 0.18, 0.05),
    (0.55, 0.7, 0.55),
    (0.75, 0.6, 1.0),
    (0.05, 0.05, 0.05),
)
"""None is a goal's or a puck's: orange, pink, turquoise, white, brown, sage, lilac, black."""
CLEAR = 0.08
"""Seen from above, from a thing's centre to what the task is about: too far for a thing that is
not higher than 4 cm to hide it from a camera that looks down by 35 degrees."""
KINDS = ("box", "cylinder", "sphere")


def strewn(
    rng: Generator, n: int, path: Sequence[Point], others: Sequence[Point]
) -> list[Ornament]:
    """n boxes, cylinders and balls, 2 to 4 cm wide and high.

    path: what the hand follows in straight lines. others: what else must be seen.
    """
    ways = [*pairwise(path), *((point, point) for point in others)]
    things: list[Ornament] = []
    while len(things) < n:
        spot = np.array([rng.uniform(-0.28, 0.28), rng.uniform(0.5, 0.92)])
        half = rng.uniform(0.01, 0.02, 2)
        kind, color = KINDS[rng.integers(len(KINDS))], COLORS[rng.integers(len(COLORS))]
        if any(to_segment(spot, start, end) < CLEAR for start, end in ways):
            continue
        width, height = half if kind != "sphere" else half[[0, 0]]
        size = (width, width if kind == "box" else height, height)
        things.append(Ornament(kind, size, np.array([*spot, height]), color))
    return things
