"""HoliTom's static windows: partition frames so that collapsing static patches saves most tokens.

Source: HoliTom (arXiv 2505.21334), temporal segmentation. The dynamic programme only looks
back, so the same object serves frames that arrive one by one and whole videos: `push` each
frame's links, then `flush`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..data import Segment
from ..errors import ConfigError, ValueShapeError

_UNREACHABLE = -(1 << 60)


@dataclass(slots=True)
class StaticWindows:
    """Incremental segmentation of one stream.

    A patch is static over frames s..e if all adjacent links inside hold; the gain of a window
    is (number of static patches) x (e - s). Among partitions of equal total gain the single
    frame wins over a window, and a shorter window over a longer one.

    max_frames: longest segment.
    lag: boundaries of the best partition that are older than this many frames are committed,
        certain or not, so a frame waits for less than lag + max_frames frames; None waits for
        certainty. With lag >= the number of frames the segments equal the offline optimum.

    Frames that belong to no possible future window are committed at once: every way to go on
    backtracks through the same boundaries.
    """

    max_frames: int = 1024
    lag: int | None = None
    _frames: int = 0
    _committed: int = 0
    _best: list[int] = field(default_factory=lambda: [0])
    _window: list[int] = field(default_factory=lambda: [0])
    _run: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.max_frames < 1:
            raise ConfigError(f"max_frames is {self.max_frames}; it must be at least 1.")
        if self.lag is not None and self.lag < 0:
            raise ConfigError(f"lag is {self.lag}; it must be 0 or more, or None.")

    @property
    def frames(self) -> int:
        """Frames pushed so far."""
        return self._frames

    @property
    def saved_tokens(self) -> int:
        """Tokens saved by the best partition of all frames pushed so far."""
        return self._best[-1]

    def push(self, links: NDArray[np.bool_] | None) -> list[Segment]:
        """Add a frame; return the segments that became final.

        links: bool [p], which patches equal the frame before; None for the first frame.
        """
        if (links is None) != (self._frames == 0):
            raise ValueShapeError(
                "links is None for the first frame of a stream and an array for all others; "
                f"this is frame {self._frames}."
            )
        gain = self._gains(links)
        reach = min(len(gain), self.max_frames, self._frames + 1 - self._committed)
        candidates = np.array(self._best[-1 : -reach - 1 : -1]) + gain[:reach]
        choice = int(candidates.argmax())
        self._best.append(int(candidates[choice]))
        self._window.append(choice + 1)
        self._frames += 1
        return self._commit(len(gain))

    def flush(self) -> list[Segment]:
        """End of the stream: commit what is left."""
        return self._take(self._frames)

    def _gains(self, links: NDArray[np.bool_] | None) -> NDArray[np.int64]:
        """Gain of the windows of 1, 2, ... frames that end at the new frame."""
        if links is None:
            return np.zeros(1, dtype=np.int64)
        run = np.zeros(links.shape, np.int64) if self._run is None else self._run
        self._run = np.where(links, np.minimum(run + 1, self.max_frames), 0)
        at_least = np.bincount(self._run)[::-1].cumsum()[::-1]
        return at_least * np.arange(len(at_least))

    def _parent(self, boundary: int) -> int:
        return boundary - self._window[boundary - self._committed]

    def _reachable(self, boundary: int) -> bool:
        return self._best[boundary - self._committed] >= 0

    def _commit(self, longest_window: int) -> list[Segment]:
        """Commit up to the last boundary common to all ways the stream can go on."""
        reach = min(longest_window, self.max_frames - 1, self._frames - self._committed)
        common = self._frames
        for start in range(self._frames - reach, self._frames):
            other = start if self._reachable(start) else common
            while other != common:
                common, other = min(common, other), self._parent(max(common, other))
        if self.lag is None or self._frames - self.lag <= common:
            return self._take(common)
        forced = self._frames
        while forced > self._frames - self.lag:
            forced = self._parent(forced)
        return self._take(forced)

    def _take(self, boundary: int) -> list[Segment]:
        """Commit the best partition up to `boundary` and forget what lies before it."""
        done: list[Segment] = []
        stop = boundary
        while stop > self._committed:
            done.append(Segment(self._parent(stop), stop))
            stop = self._parent(stop)
        through = {boundary}
        for later in range(boundary + 1, self._frames + 1):
            if self._reachable(later) and self._parent(later) in through:
                through.add(later)
        offset = boundary - self._committed
        self._best = [
            value if boundary + i in through else _UNREACHABLE
            for i, value in enumerate(self._best[offset:])
        ]
        self._window = self._window[offset:]
        self._committed = boundary
        return done[::-1]


def segment(links: NDArray[np.bool_], max_frames: int = 1024) -> tuple[list[Segment], int]:
    """Offline segmentation of a whole video.

    links: bool [t-1, p]. Returns the segments and the tokens they save: those of `StaticWindows`
    without a lag, from the gains of all windows at once.
    """
    gains = _window_gains(links, max_frames)
    best, window = [0], [0]
    for stop in range(1, links.shape[0] + 2):
        reached = [best[stop - 1]]
        reached += [best[stop - w] + gain for w, gain in enumerate(gains[stop - 1], start=2)]
        most = max(reached)
        best.append(most)
        window.append(reached.index(most) + 1)
    segments, stop = [], len(best) - 1
    while stop:
        segments.append(Segment(stop - window[stop], stop))
        stop -= window[stop]
    return segments[::-1], best[-1]


def _window_gains(links: NDArray[np.bool_], max_frames: int) -> list[list[int]]:
    """Gains of the windows of 2, 3, ... frames that end at each frame, as far as any is static."""
    frames = links.shape[0] + 1
    gains: list[list[int]] = [[] for _ in range(frames)]
    each = static = np.packbits(links, axis=1)
    for w in range(2, min(max_frames, frames) + 1):
        static = static if w == 2 else static[1:] & each[: frames - w + 1]
        saved = np.bitwise_count(static).sum(1) * (w - 1)
        if not saved.any():
            break
        for ending, gain in zip(gains[w - 1 :], saved.tolist(), strict=True):
            ending.append(gain)
    return gains
