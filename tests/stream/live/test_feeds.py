"""Real sources as feeds: FFmpeg's test pictures as a camera, a file, a Ray actor that is killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from stream.errors import SourceError
from stream.live.cameras import RemoteFeed
from stream.live.feeds import Feed, FileFeed, open_feed
from stream.sources.live_values import End, LiveFrame, LiveSettings
from tests.stream.sources.making import write_video

SHORT = "lavfi:testsrc2=size=64x48:rate=20:duration=2"
CAMERA = "lavfi:testsrc2=size=64x48:rate=20"


def drained(feed: Feed, enough: Callable[[list[LiveFrame]], bool]) -> list[LiveFrame]:
    """Frames until `enough` of them, or the end."""
    frames: list[LiveFrame] = []
    while not enough(frames) and not isinstance(got := feed.take(5.0), End):
        frames += got if isinstance(got, list) else []
    feed.close()
    return frames


def all_of(frames: list[LiveFrame]) -> bool:
    return False


def test_a_live_feed_gives_what_the_rate_asks_for() -> None:
    frames = drained(open_feed(SHORT, 5.0, LiveSettings(policy="block")), all_of)
    assert [round(f.frame.pts_s, 3) for f in frames] == [t / 5 for t in range(10)]


def test_a_file_feed_gives_a_file_at_a_rate(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", frames=30)
    feed = open_feed(str(path), 1e3)
    assert isinstance(feed, FileFeed)
    frames = drained(feed, all_of)
    assert len(frames) == 30
    assert feed.said()["frames_delivered"] == 30


@pytest.mark.usefixtures("one_ray")
def test_an_actor_gives_the_same_frames() -> None:
    settings = LiveSettings(policy="block")
    frames = drained(RemoteFeed(SHORT, 5.0, settings), all_of)
    assert [round(f.frame.pts_s, 3) for f in frames] == [t / 5 for t in range(10)]


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
def test_a_killed_camera_comes_back_behind_a_gap() -> None:
    feed = RemoteFeed(CAMERA, None, LiveSettings(policy="drop-oldest"))
    killed = False

    def enough(frames: list[LiveFrame]) -> bool:
        nonlocal killed
        if len(frames) > 5 and not killed:
            killed = True
            feed.kill()
        return any(f.gap and "reconnect" in f.gap.causes for f in frames)

    frames = drained(feed, enough)
    times = [f.frame.pts_s for f in frames]
    assert times == sorted(set(times))
    assert frames[-1].gap is not None


def test_what_can_never_be_opened_is_an_error_at_once() -> None:
    for address in ("/no/such/file.mp4", "rtsp://"):
        with pytest.raises(SourceError):
            open_feed(address, 2.0)
        with pytest.raises(SourceError):
            RemoteFeed(address, 2.0, LiveSettings())
