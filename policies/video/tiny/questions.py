"""Questions with single-word answers, read off a scene script.

Most types hinge on something small that is visible in 1 or 2 of the sampled frames; the rest on a
small still or moving thing, on the order of events, or on the surface behind them. Within a type,
each answer is as likely as any other, so a guess scores `CHANCE[type]`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .world import COLORS, DIRECTIONS, SHAPES, SURFACES, ZONES, Scene, Thing

NUMBERS = ("one", "two", "three", "four")
ORDINALS = ("first", "second", "third", "fourth")
PLAIN_SHAPES = SHAPES[:-1]


@dataclass(frozen=True, slots=True)
class Question:
    type: str
    text: str
    answer: str
    choices: tuple[str, ...]


CHOICES: dict[str, tuple[str, ...]] = {
    "still_color": tuple(COLORS),
    "still_shape": PLAIN_SHAPES,
    "brief_color": tuple(COLORS),
    "brief_shape": PLAIN_SHAPES,
    "last_star": tuple(COLORS),
    "order": tuple(COLORS),
    "when": ORDINALS,
    "where": ZONES,
    "behind": SURFACES,
    "direction": tuple(DIRECTIONS),
    "mover_shape": PLAIN_SHAPES,
    "count": NUMBERS,
    "cut_color": tuple(COLORS),
    "surface": SURFACES,
}
TYPES = tuple(CHOICES)
CHANCE = {kind: 0.5 if kind == "order" else 1 / len(names) for kind, names in CHOICES.items()}

TEMPLATES: dict[str, tuple[str, ...]] = {
    "still_color": (
        "What color is the {shape}?",
        "Which color is the {shape}?",
        "Tell me the color of the {shape}.",
    ),
    "still_shape": (
        "What shape is the {color} object?",
        "Which shape does the {color} object have?",
        "Tell me the shape of the {color} object.",
    ),
    "brief_color": (
        "What color was the {shape} that showed up briefly?",
        "Which color was the {shape} that flashed?",
        "A {shape} appeared for a moment. What color was it?",
    ),
    "brief_shape": (
        "What shape was the {color} object that showed up briefly?",
        "Which shape was the {color} object that flashed?",
        "A {color} object appeared for a moment. What shape was it?",
    ),
    "last_star": (
        "What color was the {end} star?",
        "Which color was the star that appeared {end}?",
        "Tell me the color of the {end} star.",
    ),
    "order": (
        "Which star came first, the {a} one or the {b} one?",
        "Did the {a} star or the {b} star appear first?",
        "What appeared first, the {a} star or the {b} star?",
    ),
    "when": (
        "In which quarter of the video does the {color} star appear?",
        "Which quarter of the video shows the {color} star?",
        "When was the {color} star seen, in which quarter?",
    ),
    "where": (
        "Where in the frame is the {color} {shape}?",
        "In which part of the picture is the {color} {shape}?",
        "Where was the {color} {shape} seen?",
    ),
    "behind": (
        "What surface is behind the {color} star?",
        "Which surface was the {color} star seen on?",
        "On what surface did the {color} star appear?",
    ),
    "direction": (
        "Which way does the moving object go?",
        "In which direction does the object move?",
        "What is the direction of the moving object?",
    ),
    "mover_shape": (
        "What shape is the moving object?",
        "Which shape moves?",
        "Tell me the shape of the object that moves.",
    ),
    "count": (
        "How many stars appear?",
        "How many stars are there in the video?",
        "Count the stars.",
    ),
    "cut_color": (
        "What color is the {shape} in the {end} shot?",
        "Which color does the {shape} have in the {end} shot?",
        "In the {end} shot, what color is the {shape}?",
    ),
    "surface": (
        "What surface is shown in the {end} shot?",
        "Which surface does the {end} shot show?",
        "In the {end} shot, what surface is it?",
    ),
}


def all_questions(scene: Scene, rng: random.Random) -> dict[str, list[Question]]:
    """Every question that the scene can answer, by type, each in one of its wordings."""
    return {kind: list(make(scene, rng)) for kind, make in _MAKERS.items()}


def draw_questions(scene: Scene, n: int, rng: random.Random) -> list[Question]:
    """`n` questions of as many types as there are; they repeat only when nothing else is left."""
    pools = [pool for pool in all_questions(scene, rng).values() if pool]
    rng.shuffle(pools)
    for pool in pools:
        rng.shuffle(pool)
    depth = max(len(pool) for pool in pools)
    ordered = [pool[i] for i in range(depth) for pool in pools if i < len(pool)]
    return [ordered[i % len(ordered)] for i in range(n)]


def one_of_each(scene: Scene, rng: random.Random) -> list[Question]:
    """One question of every type that the scene can answer."""
    return [rng.choice(pool) for pool in all_questions(scene, rng).values() if pool]


def _ask(rng: random.Random, kind: str, answer: str, **names: str) -> Question:
    text = rng.choice(TEMPLATES[kind]).format(**names)
    choices = (names["a"], names["b"]) if kind == "order" else CHOICES[kind]
    return Question(kind, text, answer, choices)


def _named(scene: Scene) -> list[Thing]:
    return [thing for thing in scene.things if thing.kind != "pebble"]


def _unique(scene: Scene, thing: Thing, attribute: str) -> bool:
    values = [getattr(other, attribute) for other in _named(scene)]
    return values.count(getattr(thing, attribute)) == 1


def _color_of(kind: str, thing_kind: str) -> Callable[[Scene, random.Random], Iterator[Question]]:
    def make(scene: Scene, rng: random.Random) -> Iterator[Question]:
        for thing in _named(scene):
            if thing.kind == thing_kind and _unique(scene, thing, "shape"):
                yield _ask(rng, kind, thing.color, shape=thing.shape)

    return make


def _shape_of(kind: str, thing_kind: str) -> Callable[[Scene, random.Random], Iterator[Question]]:
    def make(scene: Scene, rng: random.Random) -> Iterator[Question]:
        for thing in _named(scene):
            if thing.kind == thing_kind and _unique(scene, thing, "color"):
                yield _ask(rng, kind, thing.shape, color=thing.color)

    return make


def _last_star(scene: Scene, rng: random.Random) -> Iterator[Question]:
    stars = scene.of("star")
    if len(stars) >= 2:
        yield _ask(rng, "last_star", stars[0].color, end="first")
        yield _ask(rng, "last_star", stars[-1].color, end="last")


def _order(scene: Scene, rng: random.Random) -> Iterator[Question]:
    stars = scene.of("star")
    for i, earlier in enumerate(stars):
        for later in stars[i + 1 :]:
            a, b = rng.sample((earlier.color, later.color), 2)
            yield _ask(rng, "order", earlier.color, a=a, b=b)


def _when(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """Stars that lie inside one quarter, with some slack at its ends."""
    quarter_s = scene.duration_s / 4
    slack_s = 0.4 * scene.interval_s
    for star in scene.of("star"):
        first = int(max(star.start_s - slack_s, 0.0) // quarter_s)
        last = int(min(star.end_s + slack_s, scene.duration_s * 0.999) // quarter_s)
        if first == last:
            yield _ask(rng, "when", ORDINALS[first], color=star.color)


def _where(scene: Scene, rng: random.Random) -> Iterator[Question]:
    for thing in scene.of("star", "brief"):
        if thing.zone is not None:
            yield _ask(rng, "where", thing.zone, color=thing.color, shape=thing.shape)


def _behind(scene: Scene, rng: random.Random) -> Iterator[Question]:
    if len(scene.shots) >= 2:
        for star in scene.of("star"):
            yield _ask(rng, "behind", scene.shot_at(star.start_s).surface, color=star.color)


def _direction(scene: Scene, rng: random.Random) -> Iterator[Question]:
    for mover in scene.of("mover"):
        pairs = DIRECTIONS.items()
        name = max(pairs, key=lambda p: p[1][0] * mover.vx_px_s + p[1][1] * mover.vy_px_s)[0]
        yield _ask(rng, "direction", name)


def _mover_shape(scene: Scene, rng: random.Random) -> Iterator[Question]:
    for mover in scene.of("mover"):
        yield _ask(rng, "mover_shape", mover.shape)


def _count(scene: Scene, rng: random.Random) -> Iterator[Question]:
    stars = scene.of("star")
    if stars:
        yield _ask(rng, "count", NUMBERS[len(stars) - 1])


def _cut_color(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """Two still things of one shape, one in the first shot and one in the last, and no third."""
    first, last = scene.shots[0], scene.shots[-1]
    for shape in PLAIN_SHAPES:
        twins = [thing for thing in _named(scene) if thing.shape == shape]
        shots = [scene.shot_at(twin.start_s) for twin in twins if twin.kind == "still"]
        if len(twins) == 2 and shots == [first, last] and first is not last:
            yield _ask(rng, "cut_color", twins[0].color, shape=shape, end="first")
            yield _ask(rng, "cut_color", twins[1].color, shape=shape, end="last")


def _surface(scene: Scene, rng: random.Random) -> Iterator[Question]:
    yield _ask(rng, "surface", scene.shots[0].surface, end="first")
    yield _ask(rng, "surface", scene.shots[-1].surface, end="last")


_MAKERS: dict[str, Callable[[Scene, random.Random], Iterator[Question]]] = {
    "still_color": _color_of("still_color", "still"),
    "still_shape": _shape_of("still_shape", "still"),
    "brief_color": _color_of("brief_color", "brief"),
    "brief_shape": _shape_of("brief_shape", "brief"),
    "last_star": _last_star,
    "order": _order,
    "when": _when,
    "where": _where,
    "behind": _behind,
    "direction": _direction,
    "mover_shape": _mover_shape,
    "count": _count,
    "cut_color": _cut_color,
    "surface": _surface,
}
