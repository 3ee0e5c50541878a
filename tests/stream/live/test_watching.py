"""Watching, what a record says afterwards, and why a thing was missed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from stream.errors import ConfigError
from stream.live.missed import stories
from stream.live.record import FILE, Recorder, read
from stream.live.session import Session
from stream.live.values import StreamConfig
from stream.live.watching import Listener, Questions, Watcher
from stream.reducers.holitom import HoliTom
from stream.sinks.rerun_stream import RerunStream
from stream.sources.live_values import End, Gap, LiveFrame, Silence

from .fakes import FakeModel, arrived, picture

AT_ONCE = 1e-9
CONFIG = StreamConfig(fps=None, lag_frames=0, tokens_per_s=16.0, window_frames=3, gate_level=6.0)


class Scripted:
    """A feed that gives what it was told to, one thing a turn."""

    def __init__(self, *script: LiveFrame | Silence | End) -> None:
        self._script = list(script)
        self.closed = False

    def take(self, timeout_s: float) -> list[LiveFrame] | Silence | End:
        got = self._script.pop(0) if self._script else End("the script ended")
        return [got] if isinstance(got, LiveFrame) else got

    def said(self) -> dict[str, Any]:
        return {"phase": "live"}

    def close(self) -> None:
        self.closed = True


def run(
    script: Sequence[LiveFrame | Silence | End],
    questions: Questions,
    listeners: Sequence[Listener] = (),
) -> list[dict[str, Any]]:
    session = Session(FakeModel(), HoliTom(inner=None))
    session.attach("door", CONFIG)
    feed = Scripted(*script)
    watcher = Watcher(session, {"door": feed}, questions, listeners)
    rows = []
    while watcher.watching:
        rows += list(watcher.turn())
    assert feed.closed
    return rows


def day() -> list[LiveFrame]:
    """Eight seconds: the fourth second shows what the third did."""
    levels = [10, 70, 130, 130, 190, 250, 40, 100]
    frames = [arrived(picture(level, 3, 5), t) for t, level in enumerate(levels)]
    return [*frames[:5], arrived(picture(250), 5, Gap(("reconnect",), 0.5)), *frames[6:]]


def test_questions_are_asked_and_answers_say_what_they_rest_on() -> None:
    rows = run(day(), Questions(asked=("#10",), every_s=AT_ONCE, status_s=1e9))
    answers = [r for r in rows if r["kind"] == "answer"]
    assert len(answers) == 9
    assert answers[-1]["answer"] == "3 frames from 5 to 7"
    assert answers[-1]["seen_s"] == [[5, 5], [6, 6], [7, 7]]
    assert all(r["frame_age_s"] > 0 and r["stream"] == "door" for r in answers)
    assert [a["pts_s"] for a in answers[2:4]] == [2, 3]
    assert answers[3]["seen_s"] == answers[2]["seen_s"]
    status = next(r for r in rows if r["kind"] == "status")
    assert (status["frames"], status["gated"], status["gaps"]) == (8, 1, 1)
    assert rows[-1]["kind"] == "end"
    assert rows[-1]["said"] == "the script ended"


def test_a_standing_question_is_told_when_its_answer_changes() -> None:
    rows = run(day(), Questions(standing=("#10",), every_s=AT_ONCE, status_s=1e9))
    answers = [r for r in rows if r["kind"] == "answer"]
    assert len(answers) == 7
    assert answers[0]["was"] is None
    assert [r["was"] for r in answers[1:]] == [r["answer"] for r in answers[:-1]]


def test_silence_is_told_once_with_the_age_of_the_newest_frame() -> None:
    quiet = Silence(1.0, "silent", 7.5, "no packet for 5 s")
    script = [day()[0], quiet, quiet, arrived(picture(99), 20.0)]
    rows = run(script, Questions(status_s=1e9))
    phases = [r for r in rows if r["kind"] == "phase"]
    assert [(r["phase"], r["frame_age_s"]) for r in phases] == [("silent", 7.5), ("live", 0.0)]


def test_before_the_first_frame_a_question_waits() -> None:
    nothing = Silence(0.1, "connecting", None, "")
    rows = run([nothing], Questions(asked=("#1",), every_s=AT_ONCE, status_s=1e9))
    assert "has given no frame yet" in rows[0]["said"]


def test_a_record_says_what_became_of_every_frame(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "record", {"streams": {"door": "scripted"}})
    run(day(), Questions(asked=("#10",), every_s=AT_ONCE), [recorder])
    recorder.close()
    header, rows = read(tmp_path / "record")
    assert header["streams"] == {"door": "scripted"}
    story = stories(rows)["door"]

    assert sorted(story.fates) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [t for t, f in story.fates.items() if f.gated] == [3]
    for fate in story.fates.values():
        if not fate.gated:
            assert fate.kept + fate.merged + fate.dropped == 16
            assert fate.kept + fate.merged >= 1
    assert story.fates[0].evicted_s is not None
    assert story.fates[7].evicted_s is None
    assert "archived" in story.fates[0].said
    assert story.fates[3].said.startswith("gated")
    assert story.missed == [(5, 0, ("reconnect",))]
    assert [f.pts_s for f in story.around(4.6, 0.7)] == [4, 5]
    assert [story.saw(story.answers[-1], t) for t in (2.0, 5.0, 6.0, 6.7)] == [False, *[True] * 3]
    assert story.saw(story.answers[3], 3.0)
    pictures = sorted((tmp_path / "record" / "frames" / "door").iterdir())
    assert len(pictures) == 8


def test_a_record_cut_short_is_read_and_a_foreign_one_refused(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, {}, pictures=False)
    recorder.told({"kind": "gated", "stream": "door", "pts_s": 1.0})
    recorder.close()
    path = tmp_path / FILE
    path.write_text(path.read_text() + '{"kind": "part", "stre')
    assert stories(read(tmp_path)[1])["door"].fates[1.0].gated
    with pytest.raises(ConfigError, match="holds a record already"):
        Recorder(tmp_path, {})
    path.write_text(json.dumps({"format": "other"}) + "\n")
    with pytest.raises(ConfigError, match="does not begin with a foveate-stream header"):
        read(tmp_path)
    with pytest.raises(ConfigError, match="give a folder that `--record` wrote"):
        read(tmp_path / "nowhere")


def test_rerun_is_read_back(tmp_path: Path) -> None:
    from rerun.chunk import RrdReader

    view = RerunStream(tmp_path / "out.rrd")
    run(day(), Questions(asked=("#10",), every_s=AT_ONCE, status_s=AT_ONCE), [view])
    view.close()
    rows: dict[str, int] = {}
    for chunk in RrdReader(str(tmp_path / "out.rrd")).stream().to_chunks():
        rows[chunk.entity_path] = rows.get(chunk.entity_path, 0) + chunk.num_rows
    assert rows["/door/frame"] == 7
    assert rows["/door/lag_p95_s"] == 9
    assert rows["/door/log"] == 9 + 2
    with pytest.raises(ConfigError, match=r"name it \.rrd"):
        RerunStream(tmp_path / "out.mp4")
