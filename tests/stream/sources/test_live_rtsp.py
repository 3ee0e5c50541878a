"""Live sources against a real RTSP server, which is killed, restarted, stalled and frozen.

The server is GStreamer's. Where it is not installed these tests skip and say what is missing; with
FOVEATE_REQUIRE_RTSP=1 they fail instead.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from stream.sources import Fps, open_source
from stream.sources.live import CLOSE_S, Live
from stream.sources.live_soak import soak
from stream.sources.live_values import LiveFrame, LiveSettings, Silence
from stream.sources.survey import rss_mib
from tests.stream.sources.live_servers import (
    QUICK,
    RtspServer,
    next_frame,
    rtsp_is_missing,
    wait_until,
)


@pytest.fixture(scope="module", autouse=True)
def _rtsp_can_be_served() -> None:
    if missing := rtsp_is_missing():
        if os.environ.get("FOVEATE_REQUIRE_RTSP") == "1":
            pytest.fail(missing)
        pytest.skip(missing)


@pytest.fixture
def server() -> Iterator[RtspServer]:
    server = RtspServer()
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("live")]


def test_frames_come_in_step_and_fresh(server: RtspServer) -> None:
    with Live(server.url(), QUICK) as source:
        frames = [next_frame(source) for _ in range(30)]
        ages_s = []
        for _ in range(15):
            got = next_frame(source)
            ages_s.append(got.age_s(time.monotonic()))
        assert source.info.codec == "h264"
        assert "hunter2" not in f"{source!r} {source.stats} {source.info}"
    steps_s = np.diff([got.frame.pts_s for got in frames[1:]])
    assert np.median(steps_s) == pytest.approx(1 / server.fps, rel=0.05)
    assert all(got.frame.image.shape == (240, 320, 3) for got in frames)
    assert all(got.gap is None for got in frames)
    assert np.median(ages_s) < 0.05


def test_a_wrong_password_is_said_but_not_shown(server: RtspServer) -> None:
    with Live(server.url().replace("hunter2", "hunter3"), QUICK) as source:
        wait_until(lambda: "401" in source.stats.last_error)
        assert "hunter" not in f"{source!r} {source.stats} {source.take(0)}"


def test_a_camera_killed_and_restarted_three_times(server: RtspServer) -> None:
    with Live(server.url(), QUICK) as source:
        last = next_frame(source)
        for _ in range(30):
            last = next_frame(source)
        gc.collect()
        before_mib = rss_mib()
        for outage in range(1, 4):
            server.kill()
            killed_s = time.monotonic()
            while isinstance(got := source.take(0.4), LiveFrame):
                last = got
            silence = got
            assert isinstance(silence, Silence)
            assert silence.frame_age_s is not None
            assert silence.phase in ("lost", "silent", "connecting")
            server.start()
            started_s = time.monotonic()
            got = next_frame(source)
            while got.gap is None:
                assert got.arrival_s < started_s
                got = next_frame(source)
            assert got.gap.causes == ("reconnect",)
            assert got.arrival_s > killed_s
            assert got.age_s(time.monotonic()) < 0.5
            assert got.gap.missing_s == pytest.approx(got.arrival_s - last.arrival_s, abs=0.5)
            assert got.frame.pts_s - last.frame.pts_s == pytest.approx(got.gap.missing_s, abs=0.5)
            assert source.stats.reconnects == outage
            for _ in range(20):
                previous, last = last, next_frame(source)
                assert last.gap is None
                assert last.arrival_s > got.arrival_s
                assert last.frame.pts_s > previous.frame.pts_s
        gc.collect()
        assert source.stats.gaps == 3
        assert "no connection to 127.0.0.1" in source.stats.last_error
        assert rss_mib() - before_mib < 16


def test_a_new_size_after_a_restart(server: RtspServer) -> None:
    with Live(server.url(), QUICK) as source:
        next_frame(source)
        server.kill()
        server.start("240x320")
        got = wait_until(lambda: (got := next_frame(source)).gap and got)
        assert got.gap.causes == ("reconnect", "change")
        assert got.frame.image.shape == (320, 240, 3)


def test_a_stalled_camera_is_silent_and_comes_back(server: RtspServer) -> None:
    """Whose usual step is known: behind a single picture nothing can be told from a slow camera."""
    with Live(server.url(), QUICK) as source:
        for _ in range(5):
            next_frame(source)
        server.stall()
        try:
            silence = wait_until(lambda: isinstance(got := source.take(0.5), Silence) and got)
            wait_until(lambda: "silent" in [change.phase for change in source.stats.changes])
            assert silence.frame_age_s is not None
        finally:
            server.resume()
        got = wait_until(lambda: (got := next_frame(source)).gap and got)
        assert got.gap.missing_s >= 0.5
        assert got.age_s(time.monotonic()) < 0.5
        assert "frozen" not in [change.phase for change in source.stats.changes]


def test_a_still_picture_is_frozen_and_not_silent(server: RtspServer) -> None:
    with Live(server.url("still"), QUICK) as source:
        next_frame(source)
        wait_until(lambda: source.stats.phase == "frozen")
        for _ in range(20):
            assert isinstance(source.take(0.5), LiveFrame)
        assert source.stats.phase == "frozen"
        assert [change.phase for change in source.stats.changes] == ["live", "frozen"]


def test_a_slow_consumer_sees_now(server: RtspServer) -> None:
    report = soak(server.url(), 3.0, QUICK, pause_s=0.25)
    assert report["fps_in"] > 0.8 * server.fps
    assert report["fps_out"] < 5
    assert report["age_p50_s"] < 1.5 / server.fps
    assert report["frames_dropped"] > 20


@pytest.mark.parametrize("when", ["connecting", "streaming"])
def test_closing_while_the_network_hangs(server: RtspServer, when: str) -> None:
    source = None
    try:
        if when == "connecting":
            server.stall()
        source = Live(server.url(), LiveSettings(open_timeout_s=60, silent_s=60))
        if when == "streaming":
            next_frame(source)
            server.stall()
        time.sleep(0.3)
    finally:
        assert source is not None
        began_s = time.monotonic()
        source.close()
        took_s = time.monotonic() - began_s
        server.resume()
    assert took_s < CLOSE_S / 2


def test_as_a_source(server: RtspServer) -> None:
    with open_source(server.url()) as source:
        assert (source.info.width, source.info.height) == (320, 240)
        frames = source.read(Fps(5))
        times_s = [next(frames).pts_s for _ in range(6)]
    assert times_s[-1] - times_s[0] == pytest.approx(1.0, abs=0.35)


def test_over_udp(server: RtspServer) -> None:
    with Live(server.url(), QUICK.model_copy(update={"rtsp_transport": "udp"})) as source:
        assert next_frame(source).frame.image.shape == (240, 320, 3)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_minutes_with_many_outages_leave_memory_flat(server: RtspServer) -> None:
    with Live(server.url(), QUICK) as source:
        next_frame(source)
        levels_mib = []
        for _ in range(20):
            for _ in range(60):
                next_frame(source)
            server.kill()
            server.start()
            wait_until(lambda: next_frame(source).gap)
            gc.collect()
            levels_mib.append(rss_mib())
        assert source.stats.reconnects == 20
    assert levels_mib[-1] - levels_mib[4] < 8
