"""Frames of a stream, held until their segment is known."""

from __future__ import annotations

import torch
from torch import Tensor

from stream.ops import similarity
from stream.pipeline import EncodedVideo
from stream.segmenters.static_windows import StaticWindows


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
        self._final = 0
        self._before: Tensor | None = None

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def waiting(self) -> EncodedVideo | None:
        return EncodedVideo.joined(self._frames) if self._frames else None

    def push(self, frame: EncodedVideo) -> tuple[EncodedVideo | None, float]:
        """(what may be reduced now, the share of patches that changed). frame: one grid frame."""
        links = None
        if self._before is not None:
            pair = torch.stack([self._before, frame.x])
            links = (similarity.adjacent_cosine(pair)[0] > self._tau).cpu().numpy()
        self._before = frame.x
        self._frames.append(frame)
        for segment in self._windows.push(links):
            self._final += len(segment)
        changed = 1.0 if links is None else 1.0 - float(links.mean())
        if self._lag is None or len(self._frames) <= self._lag or not self._final:
            return None, changed
        ready, self._frames = self._frames[: self._final], self._frames[self._final :]
        self._final = 0
        return EncodedVideo.joined(ready), changed

    def flush(self) -> EncodedVideo | None:
        """All that waits; the next frame begins anew."""
        waiting = self.waiting
        self._start_over()
        return waiting
