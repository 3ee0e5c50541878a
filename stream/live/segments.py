"""Frames of a stream, held until their segment is known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stream.ops import similarity
from stream.pipeline import EncodedVideo
from stream.segmenters.static_windows import StaticWindows


@dataclass(frozen=True, slots=True)
class Ready:
    """Frames to be reduced together. news: what is new in them, in frames' worth of patches; a
    segment's first frame is all new. seconds: how long they lasted."""

    video: EncodedVideo
    news: float
    seconds: float


class OpenFrames:
    """Encoded frames that wait, and HoliTom's static windows over them as they come.

    Frames leave at a boundary that is final, once the oldest has waited `lag_frames` frames; the
    longer they wait, the more the budget can be shared among them. Any later optimum of what
    leaves equals the optimum that was found, since a final boundary splits the problem. None waits
    for `flush`: then all frames leave together, as in an offline run.

    tau: cosine above which a patch equals the frame before.
    """

    def __init__(self, tau: float, max_segment_frames: int, lag_frames: int | None) -> None:
        self._tau, self._longest, self._lag = tau, max_segment_frames, lag_frames
        self._start_over()

    def _start_over(self) -> None:
        self._windows = StaticWindows(self._longest, self._lag)
        self._frames: list[EncodedVideo] = []
        self._changed: list[float] = []
        self._seconds: list[float] = []
        self._final = 0
        self._before: Tensor | None = None

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def waiting(self) -> Ready | None:
        return self._first(len(self._frames))

    def push(self, frame: EncodedVideo, seconds: float) -> tuple[Ready | None, float]:
        """(what may be reduced now, the share of patches that changed).

        frame: one grid frame; seconds: since the one before it.
        """
        links = None
        if self._before is not None:
            pair = torch.stack([self._before, frame.x])
            links = (similarity.adjacent_cosine(pair)[0] > self._tau).cpu().numpy()
        changed = 1.0 if links is None else 1.0 - float(links.mean())
        self._before = frame.x
        self._frames.append(frame)
        self._changed.append(changed)
        self._seconds.append(seconds)
        for segment in self._windows.push(links):
            self._changed[self._final] = 1.0
            self._final += len(segment)
        if self._lag is None or len(self._frames) <= self._lag or not self._final:
            return None, changed
        ready = self._first(self._final)
        self._frames = self._frames[self._final :]
        self._changed = self._changed[self._final :]
        self._seconds = self._seconds[self._final :]
        self._final = 0
        return ready, changed

    def flush(self) -> Ready | None:
        """All that waits; the next frame begins anew."""
        waiting = self.waiting
        self._start_over()
        return waiting

    def _first(self, count: int) -> Ready | None:
        if count == 0:
            return None
        news = max(1.0, sum(self._changed[:count]))
        seconds = sum(self._seconds[:count])
        return Ready(EncodedVideo.joined(self._frames[:count]), news, seconds)
