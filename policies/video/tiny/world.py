"""Seeded scene scripts: hard cuts between still shots, and small things that stay, move or flash.

Time is continuous, in seconds. A scene is written for a *cadence*: sampled uniformly at `n_frames`
frames, its still things last 4 to 10 frames, its stars and brief things 1 or 2. Every visible span
is longer than one sampling interval, so what a question asks about is seen whatever the sampling
phase.

Some pairs of colour and shape are *private* by construction (the only thing of that shape, or of
that colour), so that a question can name them; every other thing distracts.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

FRAME_PX = 224
MARGIN_PX = 15.0

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.10),
    "yellow": (0.98, 0.88, 0.08),
    "green": (0.08, 0.65, 0.12),
    "cyan": (0.10, 0.88, 0.92),
    "blue": (0.10, 0.18, 0.92),
    "pink": (0.98, 0.35, 0.78),
    "white": (1.00, 1.00, 1.00),
    "black": (0.02, 0.02, 0.02),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "bar", "star")
SURFACES = ("sand", "wood", "brick", "tile", "marble", "cloth")
ZONES = ("left", "right", "top", "bottom", "center")
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
MAX_SHOTS = 4
MAX_THINGS = 20

Split = Literal["train", "heldout"]
Kind = Literal["still", "mover", "brief", "star", "pebble"]
Rgb = tuple[float, float, float]

# Backgrounds that training never shows: bands of hue and of texture scale.
HELDOUT_HUES = ((0.08, 0.16), (0.50, 0.58), (0.84, 0.92))
HELDOUT_SCALES = (0.95, 1.10)


@dataclass(frozen=True, slots=True)
class Shot:
    """One camera setting: a static textured surface from `start_s` until the next cut."""

    start_s: float
    end_s: float
    surface: str
    dark_rgb: Rgb
    light_rgb: Rgb
    hue: float
    scale: float
    angle_rad: float
    texture_seed: int


@dataclass(frozen=True, slots=True)
class Thing:
    """A small object, centred at `x_px, y_px` at `start_s` and drawn while start <= t < end."""

    kind: Kind
    color: str
    shape: str
    rgb: Rgb
    zone: str | None
    diameter_px: float
    start_s: float
    end_s: float
    x_px: float
    y_px: float
    vx_px_s: float = 0.0
    vy_px_s: float = 0.0

    def at(self, t_s: float) -> tuple[float, float]:
        age_s = t_s - self.start_s
        return self.x_px + self.vx_px_s * age_s, self.y_px + self.vy_px_s * age_s


@dataclass(frozen=True, slots=True)
class Scene:
    split: Split
    index: int
    n_frames: int
    duration_s: float
    shots: tuple[Shot, ...]
    things: tuple[Thing, ...]

    @property
    def interval_s(self) -> float:
        return self.duration_s / self.n_frames

    def of(self, *kinds: Kind) -> list[Thing]:
        return [thing for thing in self.things if thing.kind in kinds]

    def shot_at(self, t_s: float) -> Shot:
        return next(s for s in reversed(self.shots) if s.start_s <= t_s or s is self.shots[0])


def make_scene(split: Split, index: int, n_frames: int = 32) -> Scene:
    """The scene number `index` of a split: the same arguments always give the same scene."""
    return _Builder(split, index, n_frames).build()


def _muted(rng: random.Random, hue: float, value: float) -> Rgb:
    """A colour of low saturation, so that no background looks like a named colour."""
    saturation = rng.uniform(0.05, 0.28)
    return (
        value * (1 - saturation * (0.5 - 0.5 * math.cos(2 * math.pi * hue))),
        value * (1 - saturation * (0.5 - 0.5 * math.cos(2 * math.pi * (hue - 1 / 3)))),
        value * (1 - saturation * (0.5 - 0.5 * math.cos(2 * math.pi * (hue - 2 / 3)))),
    )


def is_heldout_hue(hue: float) -> bool:
    return any(low <= hue < high for low, high in HELDOUT_HUES)


class _Builder:
    """Draws one scene; the order of the draws is the format of the world."""

    def __init__(self, split: Split, index: int, n_frames: int) -> None:
        self.rng = random.Random(f"tiny-video/{split}/{index}/{n_frames}")
        self.split: Split = split
        self.index = index
        self.n_frames = n_frames
        self.duration_s = self.rng.uniform(12.0, 16.0) * n_frames / 32
        self.dt_s = self.duration_s / n_frames
        self.things: list[Thing] = []
        self.used: set[tuple[str, str]] = set()

    def build(self) -> Scene:
        self.shots = self._shots()
        self._populate()
        return Scene(
            self.split,
            self.index,
            self.n_frames,
            self.duration_s,
            self.shots,
            tuple(sorted(self.things, key=lambda thing: thing.start_s)),
        )

    def _shots(self) -> tuple[Shot, ...]:
        rng = self.rng
        weights = (
            (1,)
            if self.n_frames < 8
            else (4, 6)
            if self.n_frames < 12
            else (2, 4, 3)
            if self.n_frames < 24
            else (1, 2, 3, 4)
        )
        n_shots = rng.choices(range(1, len(weights) + 1), weights)[0]
        spare = self.n_frames - 4 * n_shots
        shares = [rng.uniform(0.5, 1.5) for _ in range(n_shots)]
        lengths_s = [(4 + spare * share / sum(shares)) * self.dt_s for share in shares]
        shots: list[Shot] = []
        start_s = 0.0
        for length_s in lengths_s:
            surface = rng.choice([s for s in SURFACES if not shots or s != shots[-1].surface])
            shots.append(self._shot(start_s, start_s + length_s, surface))
            start_s += length_s
        return tuple(shots)

    def _shot(self, start_s: float, end_s: float, surface: str) -> Shot:
        rng = self.rng
        if self.split == "heldout":
            hue = rng.uniform(*rng.choice(HELDOUT_HUES))
            scale = rng.uniform(*HELDOUT_SCALES)
        else:
            hue = next(h for h in iter(rng.random, None) if not is_heldout_hue(h))
            scale = rng.choice((rng.uniform(0.7, 0.95), rng.uniform(1.1, 1.5)))
        dark_value = rng.uniform(0.28, 0.45)
        return Shot(
            start_s,
            end_s,
            surface,
            dark_rgb=_muted(rng, hue, dark_value),
            light_rgb=_muted(rng, hue, dark_value + rng.uniform(0.15, 0.30)),
            hue=hue,
            scale=scale,
            angle_rad=rng.uniform(-0.4, 0.4),
            texture_seed=rng.getrandbits(30),
        )

    def _populate(self) -> None:
        rng = self.rng
        shapes = rng.sample(SHAPES[:-1], 7)
        colors = rng.sample(list(COLORS), 8)
        still_shape, brief_shape, twin_shape, *common_shapes = shapes
        still_color, brief_color, *common_colors = colors
        first, last = self.shots[0], self.shots[-1]

        def common() -> tuple[str, str]:
            return rng.choice(common_colors), rng.choice(common_shapes)

        for color in rng.sample(common_colors, rng.randint(1, 4 if self.n_frames >= 12 else 3)):
            self._flash("star", color, "star")
        if rng.random() < 0.75:
            self._flash("brief", rng.choice(common_colors), brief_shape)
        if rng.random() < 0.75:
            self._flash("brief", brief_color, rng.choice(common_shapes))
        if rng.random() < 0.85:
            self._move(*common())
        if first is not last:
            before, after = rng.sample(common_colors, 2)
            self._rest(before, twin_shape, first)
            self._rest(after, twin_shape, last)
        self._rest(rng.choice(common_colors), still_shape, rng.choice(self.shots))
        self._rest(still_color, rng.choice(common_shapes), rng.choice(self.shots))
        for shot in self.shots:
            here = sum(shot.start_s <= thing.start_s < shot.end_s for thing in self.of_still())
            if here == 0 or (here < 3 and rng.random() < 0.4):
                self._rest(*common(), shot)
        for _ in range(rng.randint(0, 3)):
            self._rest("grey", "blob", rng.choice(self.shots))

    def of_still(self) -> list[Thing]:
        return [thing for thing in self.things if thing.kind == "still"]

    def _flash(self, kind: Kind, color: str, shape: str) -> None:
        """A thing seen in 1 or 2 sampled frames; stars never come at the same time."""
        rng, dt_s = self.rng, self.dt_s
        for _ in range(20):
            shot = rng.choices(self.shots, [s.end_s - s.start_s for s in self.shots])[0]
            length_s = rng.uniform(1.2, 1.9) * dt_s
            start_s = rng.uniform(shot.start_s + 0.1 * dt_s, shot.end_s - 0.1 * dt_s - length_s)
            apart_s = 2.1 * dt_s
            others = [t for t in self.things if t.kind == "star"] if kind == "star" else []
            if all(abs(t.start_s - start_s) >= apart_s for t in others) and self._place(
                kind, color, shape, start_s, start_s + length_s, rng.uniform(15.0, 21.0)
            ):
                return

    def _rest(self, color: str, shape: str, shot: Shot) -> None:
        """A still thing: the whole of a short shot, or 4 to 10 frames of a long one."""
        rng, dt_s = self.rng, self.dt_s
        shot_s = shot.end_s - shot.start_s
        length_s = min(rng.uniform(4.0, 10.0) * dt_s, shot_s)
        start_s, end_s = shot.start_s, shot.end_s
        if rng.random() < 0.65 or shot_s > 10 * dt_s:
            offset_s = rng.choice((0.0, shot_s - length_s, rng.uniform(0.0, shot_s - length_s)))
            start_s, end_s = shot.start_s + offset_s, shot.start_s + offset_s + length_s
        kind: Kind = "pebble" if shape == "blob" else "still"
        for _ in range(10):
            if self._place(kind, color, shape, start_s, end_s, rng.uniform(14.0, 21.0)):
                return

    def _move(self, color: str, shape: str) -> None:
        rng, dt_s = self.rng, self.dt_s
        for _ in range(20):
            direction = DIRECTIONS[rng.choice(list(DIRECTIONS))]
            length_s = rng.uniform(3.0, 4.0 if self.n_frames < 12 else 6.0) * dt_s
            shot = rng.choices(self.shots, [s.end_s - s.start_s for s in self.shots])[0]
            length_s = min(length_s, 0.95 * (shot.end_s - shot.start_s))
            start_s = rng.uniform(shot.start_s, shot.end_s - length_s)
            speed_px_s = rng.uniform(90.0, 150.0) / length_s
            velocity = (direction[0] * speed_px_s, direction[1] * speed_px_s)
            if self._place(
                "mover",
                color,
                shape,
                start_s,
                start_s + length_s,
                rng.uniform(17.0, 23.0),
                velocity,
            ):
                return

    def _place(
        self,
        kind: Kind,
        color: str,
        shape: str,
        start_s: float,
        end_s: float,
        diameter_px: float,
        velocity: tuple[float, float] = (0.0, 0.0),
    ) -> bool:
        """Add a thing inside the frame and clear of the others; False if it cannot be."""
        rng = self.rng
        zone = None if kind in ("mover", "pebble") else rng.choice(ZONES)
        x_px, y_px = _point(rng, zone)
        grey = rng.uniform(0.25, 0.75)
        rgb = COLORS[color] if color in COLORS else _muted(rng, rng.random(), grey)
        thing = Thing(
            kind, color, shape, rgb, zone, diameter_px, start_s, end_s, x_px, y_px, *velocity
        )
        inside = all(
            MARGIN_PX <= c <= FRAME_PX - MARGIN_PX for t in (start_s, end_s) for c in thing.at(t)
        )
        fresh = kind == "pebble" or (color, shape) not in self.used
        if not inside or not fresh or any(_collide(thing, other) for other in self.things):
            return False
        self.used.add((color, shape))
        self.things.append(thing)
        return True


def _point(rng: random.Random, zone: str | None) -> tuple[float, float]:
    """A centre inside a zone; without one, anywhere."""
    near, across = rng.uniform(0.08, 0.25), rng.uniform(0.30, 0.70)
    if zone is None:
        x, y = rng.uniform(0.07, 0.93), rng.uniform(0.07, 0.93)
    elif zone == "center":
        x, y = rng.uniform(0.38, 0.62), rng.uniform(0.38, 0.62)
    elif zone in ("left", "right"):
        x, y = (near if zone == "left" else 1 - near), across
    else:
        x, y = across, (near if zone == "top" else 1 - near)
    return x * FRAME_PX, y * FRAME_PX


def _collide(a: Thing, b: Thing) -> bool:
    """Whether two things come closer than a small gap while both are visible."""
    start_s, end_s = max(a.start_s, b.start_s), min(a.end_s, b.end_s)
    if start_s >= end_s:
        return False
    gap_px = (a.diameter_px + b.diameter_px) * 0.6 + 3.0
    steps = 9 if "mover" in (a.kind, b.kind) else 1
    return any(
        math.dist(a.at(t), b.at(t)) < gap_px
        for t in (start_s + (end_s - start_s) * i / max(steps - 1, 1) for i in range(steps))
    )
