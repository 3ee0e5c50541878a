"""A named pipe that carries a video: one pass, no seeking, a limit on waiting.

`Fps` frames are given as they come. `Uniform` (and `Fps` with a largest count) need the end of the
stream, so their frames are held, at most twice as many as asked for, and given when it ends.
"""

from __future__ import annotations

import os
import select
from collections.abc import Generator, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from stream.data import Frame
from stream.errors import SourceError

from .base import DecodeReport, Source, SourceInfo, Tally, check_start
from .demux import describe, open_container, pictures, say_if_short, video_stream
from .pictures import to_rgb
from .sampling import FpsClock, Reservoir, Sampling, Uniform

if TYPE_CHECKING:
    from av import VideoFrame

    Shown = tuple[int, float, VideoFrame]
    """Decode index, presentation time in seconds, picture."""


class PipeReader:
    """The bytes of a named pipe. Waits `timeout_s` for data, then behaves as if the pipe ended.

    What went wrong is kept in `error`: FFmpeg calls `read`, and nothing may pass through it.
    """

    def __init__(self, path: Path, timeout_s: float) -> None:
        self._path, self._timeout_s = path, timeout_s
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)
        self.bytes_read = 0
        self.error: BaseException | None = None

    def read(self, size: int) -> bytes:
        if self.error is not None:
            return b""
        try:
            if not self._poll.poll(self._timeout_s * 1000):
                raise SourceError(
                    f"{self._path} is a pipe that gave no data for {self._timeout_s:g} s "
                    f"({self.bytes_read} bytes before that); start its writer first, or allow a "
                    "longer wait (timeout_s)."
                )
            data = os.read(self._fd, size)
        except BaseException as error:
            self.error = error
            return b""
        self.bytes_read += len(data)
        return data

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self.error = self.error or ValueError("closed")


class VideoPipe(Source):
    """A video that a named pipe carries; it can be read once."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        self._name = str(path)
        self._tally = Tally()
        self._reading: Generator[Frame] | None = None
        self._reader = PipeReader(path, timeout_s)
        try:
            self._container = open_container(self._reader, self._name)
            self._stream = video_stream(self._container, self._name, threads=False)
            frames = pictures(self._container, self._stream, self._tally)
            first = next(frames, None)
            if first is None:
                raise SourceError(
                    f"{self._name} carries a video of which not one frame can be decoded "
                    f"({'; '.join(self._tally.errors) or 'it ended first'})."
                )
        except SourceError as error:
            broken, size = self._reader.error, self._reader.bytes_read
            self._reader.close()
            if broken is not None:
                raise broken from None
            if size == 0:
                raise SourceError(
                    f"{self._name} is a pipe that ended without any data; check its writer."
                ) from None
            raise SourceError(
                f"{error} It came through a pipe, which ended after {size} bytes."
            ) from None
        self._info, self._upright = describe(self._container, self._stream, first, self._name)
        self._frames = chain([first], frames)

    @property
    def info(self) -> SourceInfo:
        return self._info

    @property
    def report(self) -> DecodeReport:
        return self._tally.report()

    def read(self, sampling: Sampling, start: int = 0) -> Iterator[Frame]:
        """See `Source.read`; a second call raises SourceError. Frame.index is the decode index.

        A pipe that stalls for longer than the limit counts as cut short: what came is given.
        """
        if self._reading is not None:
            raise SourceError(
                f"{self._name} is a pipe and has been read; what went through it is gone. Write "
                "it to a file to read it again."
            )
        self._reading = self._read(sampling, check_start(start))
        return self._reading

    def close(self) -> None:
        """End the reading and let go of the pipe."""
        if self._reading is not None:
            self._reading.close()
        self._release()

    def _release(self) -> None:
        self._container.close()
        self._reader.close()

    def _read(self, sampling: Sampling, start: int) -> Generator[Frame]:
        count = 0
        for count, (index, pts_s, frame) in enumerate(sampled(self._shown(), sampling), 1):
            if count > start:
                self._tally.frames_given += 1
                yield Frame(to_rgb(frame, self._upright), pts_s, index)
        if isinstance(sampling, Uniform) and count < sampling.frames:
            self._tally.notes.append(
                f"{sampling.frames} frames asked for, the pipe carried {count}"
            )
        self._release()

    def _shown(self) -> Iterator[Shown]:
        period_s = 1 / float(self._stream.average_rate or 25)
        pts_s = -period_s
        for index, frame in enumerate(self._frames):
            pts_s = pts_s + period_s if frame.time is None else max(pts_s, frame.time)
            yield index, pts_s, frame
        say_if_short(self._container, self._tally)
        error = self._reader.error
        if isinstance(error, (SourceError, OSError)):
            self._tally.truncated = str(error)
        elif error is not None:
            raise error


def sampled(frames: Iterator[Shown], sampling: Sampling) -> Iterator[Shown]:
    """What `sampling.pick` picks, of frames that arrive one by one."""
    if isinstance(sampling, Uniform):
        yield from _spread(frames, sampling.frames)
    elif sampling.max_frames is not None:
        yield from _spread(_at_rate(frames, sampling.fps), sampling.max_frames)
    else:
        yield from _at_rate(frames, sampling.fps)


def _at_rate(frames: Iterator[Shown], fps: float) -> Iterator[Shown]:
    clock = FpsClock["Shown"](fps)
    for shown in frames:
        if (wanted := clock.push(shown, shown[1])) is not None:
            yield wanted
    if (last := clock.end()) is not None:
        yield last


def _spread(frames: Iterator[Shown], count: int) -> Iterator[Shown]:
    store = Reservoir["Shown"](count)
    for shown in frames:
        store.push(shown, shown[1])
    yield from store.end()
