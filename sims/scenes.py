"""Scenes with several coloured goals, of which the instruction names one. Pure numpy.

Lengths are metres in MetaWorld's frame: x to the robot's right, y away from it, z up, the table's
top at z = 0. Where a goal is, is a function of time, so that still, moving and jumping goals are
one thing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Point = NDArray[np.float64]
Path = Callable[[float], Point]
Layout = Callable[[Generator], "Scene"]

GOAL_COLORS = {"red": (0.95, 0.05, 0.05), "green": (0.05, 0.8, 0.1), "blue": (0.1, 0.2, 1.0)}
BALL_RADIUS = 0.03
HAND = np.array([0.0, 0.6, 0.0])
"""Under the hand at the start of an episode."""
PUCK_RADIUS = 0.02
PUCK_Z = 0.02
APART = 0.12
"""Between the centres of two balls: the circle of success around one holds no point of another."""


@dataclass(frozen=True, slots=True)
class Scene:
    """balls: colour -> where that ball is at a time in seconds; the first one is the goal.

    puck, other_puck: where they start. counts_from_s: until when being at the goal is no success.
    belt_speed: m/s at which the puck is carried along x until it is touched.
    """

    balls: dict[str, Path]
    puck: Point
    other_puck: Point
    counts_from_s: float = 0.0
    belt_speed: float = 0.0

    @property
    def color(self) -> str:
        return next(iter(self.balls))

    def goal(self, time_s: float) -> Point:
        return self.balls[self.color](time_s)


def still(point: Point) -> Path:
    return lambda _time_s: point


def circling(center: Point, radius: float, speed: float, start: float) -> Path:
    """speed: m/s, negative is clockwise seen from above. start: angle in radians."""

    def at(time_s: float) -> Point:
        angle = start + speed / radius * time_s
        return center + radius * np.array([np.cos(angle), np.sin(angle), 0.0])

    return at


def jumping(before: Point, after: Point, at_s: float) -> Path:
    return lambda time_s: before if time_s < at_s else after


def reach(rng: Generator) -> Scene:
    """Two or three balls on the table; two pucks lie about."""
    spots = _apart(rng, int(rng.integers(2, 4)), _on_table, [HAND])
    return Scene(_named(rng, [still(s) for s in spots]), *_strewn(rng, spots))


def reach_moving(rng: Generator) -> Scene:
    """The goal circles at 0.15 to 0.25 m/s; another ball lies still."""
    radius = rng.uniform(0.08, 0.12)
    center = np.array([rng.uniform(-0.08, 0.08), rng.uniform(0.66, 0.74), BALL_RADIUS])
    speed = rng.uniform(0.15, 0.25) * rng.choice([-1, 1])
    path = circling(center, radius, speed, rng.uniform(0, 2 * np.pi))
    other = _sample(rng, _on_table, lambda p: _distance(p, center) > radius + 0.1)
    return Scene(_named(rng, [path, still(other)]), *_strewn(rng, [other]))


def reach_jump(rng: Generator) -> Scene:
    """The goal jumps by 15 cm or more, 0.4 to 0.8 s after the start; then reaching it counts."""
    before, after, other = _apart(rng, 3, _on_table, [HAND], 0.15)
    at_s = rng.uniform(0.4, 0.8)
    balls = _named(rng, [jumping(before, after, at_s), still(other)])
    return Scene(balls, *_strewn(rng, [before, after, other]), counts_from_s=at_s)


def push(rng: Generator) -> Scene:
    """Two or three balls on the table behind the puck; another puck lies aside."""
    puck = _before(rng)
    balls = _apart(rng, int(rng.integers(2, 4)), _behind, [])
    return Scene(_named(rng, [still(b) for b in balls]), puck, _aside(rng, puck, balls))


def push_conveyor(rng: Generator) -> Scene:
    """As push, and a belt carries the puck to and fro at 0.05 to 0.1 m/s."""
    puck = _before(rng)
    balls = _apart(rng, 2, _behind, [])
    other = _sample(rng, _behind, lambda p: all(_distance(p, b) > 0.08 for b in balls))
    speed = rng.uniform(0.05, 0.1) * rng.choice([-1, 1])
    return Scene(_named(rng, [still(b) for b in balls]), puck, _resting(other), belt_speed=speed)


def pick_place(rng: Generator) -> Scene:
    """Two or three balls on stands behind the puck; another puck lies aside."""
    puck = _before(rng)
    balls = _apart(rng, int(rng.integers(2, 4)), _behind, [])
    other = _aside(rng, puck, balls)
    raised = [b + np.array([0, 0, rng.uniform(0.07, 0.17)]) for b in balls]
    return Scene(_named(rng, [still(b) for b in raised]), puck, other)


def _before(rng: Generator) -> Point:
    return np.array([rng.uniform(-0.1, 0.1), rng.uniform(0.6, 0.68), PUCK_Z])


def _on_table(rng: Generator) -> Point:
    return np.array([rng.uniform(-0.2, 0.2), rng.uniform(0.55, 0.85), BALL_RADIUS])


def _behind(rng: Generator) -> Point:
    return np.array([rng.uniform(-0.2, 0.2), rng.uniform(0.78, 0.88), BALL_RADIUS])


def _named(rng: Generator, paths: Sequence[Path]) -> dict[str, Path]:
    colors = rng.permutation(list(GOAL_COLORS))[: len(paths)]
    return {str(c): path for c, path in zip(colors, paths, strict=True)}


def _aside(rng: Generator, puck: Point, balls: Sequence[Point]) -> Point:
    """A place for a second puck, out of the way from the first one to any ball."""

    def clear(point: Point) -> bool:
        return all(to_segment(point, puck, ball) > 0.08 for ball in balls)

    return _resting(_sample(rng, _on_table, clear))


def _strewn(rng: Generator, spots: Sequence[Point]) -> tuple[Point, Point]:
    """Places for two pucks that hide none of the spots."""
    first, second = _apart(rng, 2, _on_table, spots, 0.08)
    return _resting(first), _resting(second)


def _apart(
    rng: Generator,
    n: int,
    draw: Callable[[Generator], Point],
    others: Sequence[Point],
    distance: float = APART,
) -> list[Point]:
    """n points at least `distance` from each other and from the others, seen from above."""

    def free(points: list[Point]) -> bool:
        taken = list(others)
        for point in points:
            if any(_distance(point, t) < distance for t in taken):
                return False
            taken.append(point)
        return True

    return _sample(rng, lambda r: [draw(r) for _ in range(n)], free)


def _sample[T](rng: Generator, draw: Callable[[Generator], T], allowed: Callable[[T], bool]) -> T:
    for _ in range(100_000):
        drawn = draw(rng)
        if allowed(drawn):
            return drawn
    raise AssertionError("A scene asks for more room than its table has.")


def _resting(point: Point) -> Point:
    return np.array([point[0], point[1], PUCK_Z])


def _distance(a: Point, b: Point) -> float:
    return float(np.linalg.norm(a[:2] - b[:2]))


def to_segment(point: Point, start: Point, end: Point) -> float:
    """How far a point lies from a straight way, in metres and seen from above."""
    along = end[:2] - start[:2]
    share = np.clip((point[:2] - start[:2]) @ along / max(float(along @ along), 1e-12), 0, 1)
    return float(np.linalg.norm(start[:2] + share * along - point[:2]))
