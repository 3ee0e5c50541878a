"""The survey of inputs, the trace of memory, and light imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stream.sources import Fps, Uniform, live
from stream.sources.live_values import LiveSettings
from stream.sources.survey import memory_trace, survey
from tests.stream.sources.making import corrupt_packets, write_video


def test_one_row_for_each_input(
    clean_mp4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hasty = LiveSettings(open_timeout_s=0.2, silent_s=0.2)
    monkeypatch.setattr(live, "LiveSettings", lambda: hasty)
    corrupt = corrupt_packets(clean_mp4, tmp_path / "corrupt.mp4", [10, 11])
    os.mkfifo(tmp_path / "pipe")
    inputs = [clean_mp4, corrupt, tmp_path, tmp_path / "pipe", "missing", "http://a:b@h/x"]
    rows = survey(inputs, timeout_s=0.1)
    assert [row["result"] for row in rows] == ["ok", "partial", *["error"] * 4]
    assert [row["kind"] for row in rows] == ["file", "file", "folder", "pipe", "nothing", "nothing"]
    assert [row["frames"] for row in rows] == [32, 32, 0, 0, 0, 0]
    assert [row["failed"] for row in rows] == [0, 2, 0, 0, 0, 0]
    assert all(row["said"] for row in rows[1:])
    assert "a:b" not in json.dumps(rows)


def test_every_frame_can_be_checked(clean_mp4: Path) -> None:
    assert survey([clean_mp4], Fps(1000))[0]["frames"] == 48


def test_memory_is_flat_in_the_length_of_a_file(tmp_path: Path) -> None:
    options = {"preset": "ultrafast", "g": "250"}
    video = write_video(tmp_path / "long.mp4", 1500, (320, 180), options=options)
    trace = list(memory_trace(video, Fps(4)))
    assert trace[0].media_s == 0
    assert trace[-1].media_s > 60
    settled = trace[len(trace) // 4].rss_mib
    assert trace[-1].rss_mib - settled < 8, f"{settled=} {trace[-1]=}"
    assert len(list(memory_trace(video, Uniform(5)))) == 5


def test_importing_sources_imports_no_decoder() -> None:
    code = (
        "import sys, stream.sources, stream.sources.survey;"
        "print(sorted({'av', 'decord', 'PIL', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
