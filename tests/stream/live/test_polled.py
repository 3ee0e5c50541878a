"""Cameras that are asked for pictures, as feeds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stream.errors import SourceError
from stream.live import polled
from stream.live.feeds import check_address, open_feed
from stream.sources.live_values import End, LiveFrame, LiveSettings, Silence

QUICK = LiveSettings(retry_first_s=0.01, retry_cap_s=0.02)
PICTURE = np.full((4, 6, 3), 7, np.uint8)


class Toy:
    """Gives what it is told to, shared by all cameras of a test."""

    script: Iterator[Any]
    opened = closed = 0

    def __init__(self, rest: str) -> None:
        if rest == "absent":
            raise OSError("no such camera")
        type(self).opened += 1

    def read(self) -> NDArray[np.uint8] | None:
        given = next(self.script)
        if isinstance(given, Exception):
            raise given
        return given

    def close(self) -> None:
        type(self).closed += 1


class Point:
    def load(self) -> type[Toy]:
        return Toy


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polled, "camera_kinds", lambda: {"toy": Point()})
    Toy.opened = Toy.closed = 0


def frames_of(*script: Any, fps: float | None = None) -> list[LiveFrame]:
    Toy.script = iter(script)
    feed = open_feed("toy:left", fps, QUICK)
    found: list[LiveFrame] = []
    while not isinstance(got := feed.take(0.05), End):
        found.extend(got if isinstance(got, list) else [])
    feed.close()
    return found


def test_pictures_come_until_the_last() -> None:
    found = frames_of(PICTURE, PICTURE + 1, None)
    assert [f.frame.image[0, 0, 0] for f in found] == [7, 8]
    assert [f.frame.index for f in found] == [0, 1]
    assert 0 <= found[0].frame.pts_s < found[1].frame.pts_s
    assert (Toy.opened, Toy.closed) == (1, 1)


def test_it_is_asked_once_a_period() -> None:
    first, second = frames_of(PICTURE, PICTURE, None, fps=20.0)
    assert second.frame.pts_s - first.frame.pts_s > 0.04


def test_a_camera_that_fails_is_opened_again_and_the_gap_is_marked() -> None:
    Toy.script = iter([PICTURE, OSError("unplugged"), PICTURE, None])
    feed = open_feed("toy:left", None, QUICK)
    assert isinstance(feed.take(0.1), list)
    lost = feed.take(0.1)
    assert isinstance(lost, Silence)
    assert (lost.phase, lost.said) == ("lost", "unplugged")
    assert feed.said()["last_error"] == "unplugged"
    while not (got := feed.take(0.05)) or isinstance(got, Silence):
        pass
    assert isinstance(got, list)
    assert got[0].gap is not None
    assert got[0].gap.causes == ("reconnect",)
    assert got[0].gap.missing_s > 0
    assert feed.said()["reconnects"] == 1
    assert isinstance(feed.take(0.1), End)
    feed.close()
    assert Toy.opened == Toy.closed == 2


def test_a_camera_that_is_not_there_is_said() -> None:
    for attempt in (lambda: open_feed("toy:absent", None), lambda: check_address("toy:absent")):
        with pytest.raises(SourceError, match="toy:absent cannot be opened: no such camera"):
            attempt()
