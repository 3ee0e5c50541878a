"""Where an attached stream's frames come from, all alike to whoever takes them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

from stream.data import Frame
from stream.sources import Fps, open_source
from stream.sources.base import Source, is_live, without_credentials
from stream.sources.live import Live
from stream.sources.live_address import parse_address
from stream.sources.live_values import End, Gap, LiveFrame, LiveSettings, Silence

from .gate import FrameClock
from .polled import PolledFeed, is_polled, open_camera

MOST_AT_ONCE = 16
"""Frames taken from one feed in one turn, so that no feed starves the others."""

FASTEST_FPS = 1000.0


class Feed(Protocol):
    """Frames of one source, taken without waiting for long."""

    def take(self, timeout_s: float) -> list[LiveFrame] | Silence | End:
        """What has come and is asked for, perhaps nothing; Silence if nothing came in time; End
        after the last."""

    def said(self) -> dict[str, Any]:
        """How the source fares, as plain data without secrets."""

    def close(self) -> None: ...


class LiveFeed:
    """A live source of this process; of its frames, those that the rate asks for.

    fps: None gives every frame. What was dropped and missed is told by the next frame given.
    """

    def __init__(self, address: str, fps: float | None, settings: LiveSettings | None) -> None:
        self._live = Live(address, settings)
        self._clock = FrameClock(fps) if fps else None
        self._dropped = 0
        self._gap: Gap | None = None

    def take(self, timeout_s: float) -> list[LiveFrame] | Silence | End:
        got = self._live.take(timeout_s)
        if not isinstance(got, LiveFrame):
            return got
        frames = [got]
        while len(frames) < MOST_AT_ONCE and isinstance(more := self._live.take(0.0), LiveFrame):
            frames.append(more)
        return [wanted for frame in frames if (wanted := self._wanted(frame)) is not None]

    def _wanted(self, got: LiveFrame) -> LiveFrame | None:
        self._dropped += got.dropped
        if got.gap is not None:
            self._gap = got.gap if self._gap is None else self._gap + got.gap
        if self._clock and not self._clock.wants(got.frame.pts_s) and self._gap is None:
            return None
        wanted = replace(got, dropped=self._dropped, gap=self._gap)
        self._dropped, self._gap = 0, None
        return wanted

    def said(self) -> dict[str, Any]:
        return self._live.stats.as_dict()

    def close(self) -> None:
        self._live.close()


class FileFeed:
    """A file or a folder of images as if it were a camera, as fast as its frames are taken."""

    def __init__(self, path: str, fps: float | None) -> None:
        self._path, self._given = path, 0
        self._source: Source = open_source(path)
        self._frames: Iterator[Frame] = self._source.read(Fps(fps or FASTEST_FPS))

    def take(self, timeout_s: float) -> list[LiveFrame] | Silence | End:
        frame = next(self._frames, None)
        if frame is None:
            return End("the file ended")
        self._given += 1
        return [LiveFrame(frame, time.monotonic(), time.time(), 0, None)]

    def said(self) -> dict[str, Any]:
        name = without_credentials(self._path)
        return {"address": name, "phase": "live", "frames_delivered": self._given}

    def close(self) -> None:
        self._source.close()


def open_feed(address: str, fps: float | None, settings: LiveSettings | None = None) -> Feed:
    """A feed of this process that gives `fps` frames a second, or all.

    Raises SourceError for what can never be opened.
    """
    if is_polled(address):
        return PolledFeed(address, fps, settings)
    return LiveFeed(address, fps, settings) if is_live(address) else FileFeed(address, fps)


def check_address(address: str) -> None:
    """Raise SourceError for what `open_feed` would refuse, without keeping it open."""
    if is_polled(address):
        open_camera(address).close()
    elif is_live(address):
        parse_address(address)
    else:
        open_source(address).close()
