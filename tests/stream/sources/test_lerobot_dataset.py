"""Episodes of a LeRobotDataset as sources of frames."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stream.errors import SourceError
from stream.sinks.lerobot_writer import LeRobotWriter
from stream.sources import Fps, Uniform, open_source
from stream.sources.lerobot_dataset import LeRobotEpisode
from stream.sources.survey import survey

LENGTHS = (8, 5, 12)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cameras; frame i of episode e is of the brightness 20 e + 15 i, or 255 less it."""
    folder = tmp_path_factory.mktemp("dataset") / "data"
    cameras = {"top": (32, 48), "wrist": (32, 48)}
    with LeRobotWriter(folder, 10, cameras, 1, 1, "robot") as writer:
        for episode, length in enumerate(LENGTHS):
            for i in range(length):
                top = np.full((32, 48, 3), 20 * episode + 15 * i, np.uint8)
                state = np.array([i], np.float32)
                images = {"top": top, "wrist": 255 - top}
                writer.add(images, state, state, f"do {episode}")
            writer.end_episode()
    return folder


@pytest.mark.parametrize("episode", range(len(LENGTHS)))
def test_an_episode_gives_its_own_frames(dataset: Path, episode: int) -> None:
    with open_source(f"{dataset}#{episode}/top") as source:
        assert isinstance(source, LeRobotEpisode)
        assert source.instruction == f"do {episode}"
        assert source.info.frames_estimate == LENGTHS[episode]
        assert source.info.duration_s == pytest.approx(LENGTHS[episode] / 10)
        frames = list(source.read(Fps(10)))
        later = list(source.read(Fps(10), start=2))
        assert source.report.complete
    assert [f.index for f in frames] == list(range(LENGTHS[episode]))
    np.testing.assert_allclose([f.pts_s for f in frames], np.arange(len(frames)) / 10, atol=1e-6)
    brightness = [f.image.mean() for f in frames]
    np.testing.assert_allclose(brightness, 20 * episode + 15 * np.arange(len(frames)), atol=4)
    assert [f.index for f in later] == list(range(2, LENGTHS[episode]))


def test_first_episode_and_camera_unless_told(dataset: Path) -> None:
    with open_source(dataset) as source:
        first = next(iter(source.read(Uniform(1))))
    with open_source(f"{dataset}#0/wrist") as source:
        wrist = next(iter(source.read(Uniform(1))))
    assert first.image.mean() < 5
    assert wrist.image.mean() > 250


def test_a_survey_knows_what_it_is(dataset: Path) -> None:
    (row,) = survey([f"{dataset}#1"])
    assert (row["kind"], row["result"], row["frames"]) == ("dataset", "ok", LENGTHS[1])
    (row,) = survey(["x" * 5000 + "#1"])
    assert (row["kind"], row["result"]) == ("nothing", "error")
    assert "unexpected" not in row["said"]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("7", "no episode '7'; it has 3"),
        ("x", "no episode 'x'"),
        ("0/back", "there are: top, wrist"),
    ],
)
def test_what_is_not_there_is_named(dataset: Path, part: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_source(f"{dataset}#{part}")


def test_other_versions_and_damage_are_refused(tmp_path: Path) -> None:
    meta = tmp_path / "meta"
    meta.mkdir()
    info = meta / "info.json"
    info.write_text(json.dumps({"codebase_version": "v2.1"}))
    with pytest.raises(SourceError, match=r"v2\.1; v3 is read"):
        open_source(tmp_path)
    info.write_text("{")
    with pytest.raises(SourceError, match="cannot be read"):
        open_source(tmp_path)
