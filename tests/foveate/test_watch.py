"""`foveate watch` and the replay of what it recorded, with a real clip and a real small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foveate.cli import app
from foveate.cli.live import duration_s
from foveate.commands.replay_stream import replay_stream
from foveate.commands.watch import names_of
from stream.errors import ConfigError


def test_watch_answers_records_and_replays(
    checkpoint: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = CliRunner().invoke(
        app,
        [
            *("watch", f"door={clip}", "--model", str(checkpoint), "--runner", "inline"),
            *("--ask", "what color is the star?", "--standing", "where is the square?"),
            *("--every", "60m", "--fps", "4", "--set", "stream.lag_frames=0"),
            *("--jsonl", str(tmp_path / "out.jsonl"), "--record", str(tmp_path / "record")),
        ],
        catch_exceptions=False,
    )
    assert run.exit_code == 0, run.output
    assert "what color is the star? ->" in run.stdout
    assert "old; first token" in run.stdout
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    answers = [r for r in rows if r["kind"] == "answer"]
    assert [r["question"] for r in answers] == ["what color is the star?", "where is the square?"]
    assert answers[0]["seen_s"][-1][1] == answers[0]["pts_s"]
    status = [r for r in rows if r["kind"] == "status"][-1]
    assert status["frames"] == status["encoded"] + status["gated"] == 8
    assert rows[-1]["kind"] == "end"
    assert 0 < status["tokens_out"] < status["tokens_in"] == 196 * status["encoded"]

    capsys.readouterr()
    replay_stream(tmp_path / "record", 1.0, 0.3, "door", as_json=True)
    told = json.loads(capsys.readouterr().out)["streams"]["door"]
    assert [round(f["pts_s"], 2) for f in told["frames"]] == [0.75, 1.0, 1.25]
    assert all("kept" in f["said"] or "gated" in f["said"] for f in told["frames"])
    assert told["answers"][0]["saw_it"]
    replay_stream(tmp_path / "record", None, 0.2, None, as_json=False)
    assert "frames from 0.0 to 1.8 s" in capsys.readouterr().out


def test_sources_have_names() -> None:
    assert names_of(["door=rtsp://a/b", "lavfi:testsrc2=rate=5"]) == {
        "door": "rtsp://a/b",
        "cam1": "lavfi:testsrc2=rate=5",
    }
    with pytest.raises(ConfigError, match="Two sources are named 'a'"):
        names_of(["a=x.mp4", "a=y.mp4"])


def test_durations() -> None:
    assert [duration_s(t) for t in ("5s", "500ms", "1m", "2.5")] == [5.0, 0.5, 60.0, 2.5]
    for wrong in ("", "s", "-1s", "0", "5 h", "inf"):
        with pytest.raises(ConfigError, match="give one like 5s"):
            duration_s(wrong)
