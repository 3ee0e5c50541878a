"""Which frames are wanted, decided on true presentation times.

One rule holds throughout: the frame shown at a wanted time is the last one that starts at or
before it (within `SAME_TIME_S`). No frame is given twice. Times are seconds, ascending.

    pts      0    1         3  4    5                (variable frame rate)
    wanted   0       2         4       6 ...         Fps(0.5)
    shown    ^    ^            ^    ^                1 is still on screen at 2
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stream.errors import ConfigError

SAME_TIME_S = 1e-6
"""Times closer than this are one time: timestamps are fractions, wanted times are not."""

Times = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Uniform:
    """`frames` frames whose wanted times are evenly spaced from the first to the last frame.

    A source with fewer gives all it has. Where two wanted times show the same frame, the later
    one takes the next frame instead, so the count is exact whatever the frame rate does.
    `Uniform(1)` gives the first frame.
    """

    frames: int

    def __post_init__(self) -> None:
        _whole("Uniform.frames", self.frames)

    def pick(self, pts_s: Times) -> Indices:
        """Ascending indices into `pts_s`, min(frames, len(pts_s)) of them."""
        have = len(pts_s)
        count = min(self.frames, have)
        if count == 0:
            return np.empty(0, np.int64)
        wanted = np.linspace(pts_s[0], pts_s[-1], count)
        shown = np.searchsorted(pts_s, wanted + SAME_TIME_S, side="right") - 1
        order = np.arange(count)
        distinct = np.maximum.accumulate(shown - order) + order
        return np.minimum(distinct, have - count + order)


@dataclass(frozen=True, slots=True)
class Fps:
    """The frames shown at the first frame's time + 0, 1/fps, 2/fps ... until the last one ends.

    The last frame is taken to last as long as the one before it. A frame that stays on screen for
    several wanted times is given once, so a rate above the source's gives every frame. Where more
    than `max_frames` would result, `max_frames` of them are taken evenly over the whole source:
    the end is never cut off.
    """

    fps: float
    max_frames: int | None = None

    def __post_init__(self) -> None:
        if not (self.fps > 0 and math.isfinite(self.fps)):
            raise ConfigError(
                f"Fps.fps is {self.fps}; it must be a finite number above 0. Use 1 for one "
                "frame a second."
            )
        if self.max_frames is not None:
            _whole("Fps.max_frames", self.max_frames)

    def pick(self, pts_s: Times) -> Indices:
        """Ascending indices into `pts_s`."""
        if len(pts_s) < 2:
            return np.arange(len(pts_s))
        since = pts_s - pts_s[0]
        end_s = 2 * since[-1] - since[-2]
        starts_s = np.append(since, end_s) - SAME_TIME_S
        shown = np.flatnonzero(np.diff(np.ceil(starts_s * self.fps)) > 0)
        if self.max_frames is None:
            return shown
        return shown[Uniform(self.max_frames).pick(pts_s[shown])]


Sampling = Uniform | Fps


@dataclass(frozen=True, slots=True)
class Within:
    """A sampling of the frames that start from `start_s` on and before `stop_s` alone."""

    sampling: Sampling
    start_s: float
    stop_s: float

    def pick(self, pts_s: Times) -> Indices:
        """Ascending indices into `pts_s`."""
        first, stop = np.searchsorted(pts_s, np.array([self.start_s, self.stop_s]) - SAME_TIME_S)
        return first + self.sampling.pick(pts_s[first:stop])


class FpsClock[T]:
    """`Fps.pick` for times that arrive one by one: a frame is known to be wanted when the next
    one (or the end) is seen, so one frame is held."""

    def __init__(self, fps: float) -> None:
        self._fps = fps
        self._held: tuple[T, float] | None = None
        self._first_s = 0.0
        self._gap_s = math.inf

    def push(self, item: T, pts_s: float) -> T | None:
        """The frame before this one, if it was wanted."""
        held, self._held = self._held, (item, pts_s)
        if held is None:
            self._first_s = pts_s
            return None
        self._gap_s = pts_s - held[1]
        return held[0] if self._wanted_within(held[1], pts_s) else None

    def end(self) -> T | None:
        """The last frame, if it was wanted."""
        if self._held is None:
            return None
        item, pts_s = self._held
        return item if self._wanted_within(pts_s, pts_s + self._gap_s) else None

    def _wanted_within(self, from_s: float, to_s: float) -> bool:
        if math.isinf(to_s):
            return True
        since_s = self._first_s + SAME_TIME_S
        return math.ceil((to_s - since_s) * self._fps) > math.ceil((from_s - since_s) * self._fps)


class Reservoir[T]:
    """`Uniform.pick` for a source of unknown length, with at most 2 * frames items held.

    Every stride-th item is kept; when the store is full every second one is dropped and the
    stride doubles. The latest item is always held, so the end is covered.
    """

    def __init__(self, frames: int) -> None:
        self._sampling = Uniform(frames)
        self._kept: list[tuple[T, float]] = []
        self._latest: tuple[T, float] | None = None
        self._stride = 1
        self._seen = 0

    def __len__(self) -> int:
        return len(self._kept) + (self._latest is not None)

    def push(self, item: T, pts_s: float) -> None:
        index, self._seen = self._seen, self._seen + 1
        self._latest = None
        if index % self._stride == 0 and len(self._kept) == 2 * self._sampling.frames - 1:
            self._kept = self._kept[::2]
            self._stride *= 2
        if index % self._stride == 0:
            self._kept.append((item, pts_s))
        else:
            self._latest = (item, pts_s)

    def end(self) -> list[T]:
        """The evenly spaced items, min(frames, items pushed) of them."""
        held = [*self._kept, *([self._latest] if self._latest else [])]
        picked = self._sampling.pick(np.array([pts_s for _, pts_s in held], np.float64))
        return [held[index][0] for index in picked]


def _whole(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number, at least 1.")
