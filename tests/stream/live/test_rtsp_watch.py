"""A real RTSP camera is watched, killed and restarted three times in one run."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from foveate.commands.ask import load_reasoner
from foveate.settings import AskConfig
from stream.live.feeds import LiveFeed
from stream.live.missed import stories
from stream.live.record import Recorder, read
from stream.live.session import Model, Session
from stream.live.values import StreamConfig
from stream.live.watching import Questions, Watcher
from stream.reducers.holitom import HoliTom
from stream.sources.survey import rss_mib
from tests.stream.sources.live_servers import QUICK, RtspServer
from tests.stream.sources.test_live_rtsp import _rtsp_can_be_served  # noqa: F401

from .fakes import PooledModel


@pytest.fixture
def server() -> Iterator[RtspServer]:
    server = RtspServer()
    yield server
    server.kill()


def of_arithmetic() -> tuple[Model, str]:
    return PooledModel(), "#128"


def tiny_video() -> tuple[Model, str]:
    config = AskConfig(model="tiny-video", max_new_tokens=4)
    return load_reasoner(config, HoliTom(inner=None)), "What color is the circle?"


@pytest.mark.slow
@pytest.mark.parametrize("make", [of_arithmetic, tiny_video])
def test_three_outages_in_one_run(
    make: Callable[[], tuple[Model, str]], server: RtspServer, tmp_path: Path
) -> None:
    model, question = make()
    session = Session(model, HoliTom(inner=None))
    config = StreamConfig(fps=5.0, gate_level=0.0, lag_frames=2, window_frames=8, archive_mib=0.05)
    session.attach("door", config)
    recorder = Recorder(tmp_path, {"streams": {}}, pictures=False)
    feed = LiveFeed(server.url(), config.fps, QUICK)
    asking = Questions(asked=(question,), every_s=0.1, status_s=1e9)
    watcher = Watcher(session, {"door": feed}, asking, [recorder])
    rows: list[dict[str, Any]] = []

    def watch_until(met: Callable[[], bool]) -> None:
        end_s = time.monotonic() + 20
        while not met():
            assert time.monotonic() < end_s, rows[-3:]
            rows.extend(watcher.turn())

    def gaps() -> int:
        return session.counts("door").gaps

    watch_until(lambda: session.counts("door").parts > 3)
    held_mib = []
    for outage in range(1, 4):
        server.kill()
        killed_s = time.monotonic()
        known = len(rows)
        watch_until(lambda: any(r["kind"] == "phase" for r in rows[known:]))  # noqa: B023
        phase = next(r for r in rows[known:] if r["kind"] == "phase")
        assert phase["phase"] in ("lost", "silent", "connecting")
        assert phase["frame_age_s"] is not None
        known = len(rows)
        watch_until(lambda: any(r["kind"] == "answer" for r in rows[known + 5 :]))  # noqa: B023
        ages_s = [r["frame_age_s"] for r in rows[known:] if r["kind"] == "answer"]
        assert ages_s == sorted(ages_s)
        assert ages_s[-1] > phase["frame_age_s"] + 0.3
        assert ages_s[-1] < time.monotonic() - killed_s + 1.0
        server.start()
        watch_until(lambda: gaps() == outage)  # noqa: B023
        seen = session.counts("door").parts
        watch_until(lambda: session.counts("door").parts > seen + 2)  # noqa: B023
        gc.collect()
        held_mib.append(rss_mib())
    assert held_mib[-1] - held_mib[0] < 32, held_mib
    watcher.close()
    recorder.close()

    told = list(read(tmp_path)[1])
    gone = [r for r in told if r["kind"] == "gap"]
    assert [r["causes"] for r in gone] == [["reconnect"]] * 3
    parts = [r for r in told if r["kind"] == "part"]
    for gap in gone:
        assert not any(r["frames_s"][0] < gap["pts_s"] <= r["frames_s"][-1] for r in parts)
    story = stories(told)["door"]
    assert all("frame_age_s" in a for a in story.answers)
    assert "hunter2" not in (tmp_path / "stream.jsonl").read_text()
