"""What is written is a LeRobotDataset v3 that lerobot reads back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stream.errors import ConfigError, SourceError
from stream.sinks.lerobot_writer import LeRobotWriter

CAMERAS = {"top": (48, 64)}


def writer(folder: Path, fps: float = 10.0, state_size: int = 3) -> LeRobotWriter:
    return LeRobotWriter(folder, fps, CAMERAS, state_size, 2, "robot", {"keep": (6,)})


def episode(n: int, seed: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    sky = np.linspace(20, 220, 64).astype(np.uint8)[None, :, None]
    frames = [np.broadcast_to(sky, (48, 64, 3)).copy() for _ in range(n)]
    for i, frame in enumerate(frames):
        frame[10:30, 4 * i : 4 * i + 12] = rng.integers(0, 255, 3)
    numbers = [rng.standard_normal(k).astype(np.float32) for k in (3, 2, 6) for _ in range(n)]
    return list(zip(frames, numbers[:n], numbers[n : 2 * n], numbers[2 * n :], strict=True))


def add(to: LeRobotWriter, frames: list[tuple[np.ndarray, ...]], task: str) -> None:
    for image, state, action, keep in frames:
        to.add({"top": image}, state, action, task, keep=keep)


def test_lerobot_reads_what_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    first, second, lost = episode(9, 0), episode(6, 1), episode(4, 2)
    with writer(folder) as sink:
        add(sink, first, "push the puck")
        sink.end_episode()
        add(sink, lost, "never finished")
    with writer(folder) as sink:
        assert sink.episodes == 1
        add(sink, second, "open the drawer")
        sink.end_episode()

    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("local/data", root=folder, video_backend="pyav")
    assert (dataset.num_episodes, len(dataset), dataset.fps) == (2, 15, 10)
    assert list((folder / "videos").rglob("*.mp4"))
    assert list((folder / "data").rglob("*.parquet"))
    for i, (image, state, action, keep) in enumerate([*first, *second]):
        item = dataset[i]
        seen = item["observation.images.top"].numpy().transpose(1, 2, 0) * 255
        assert np.abs(seen - image).mean() < 6
        np.testing.assert_array_equal(item["observation.state"], state)
        np.testing.assert_array_equal(item["action"], action)
        np.testing.assert_array_equal(item["keep"], keep)
        assert item["task"] == ("push the puck" if i < 9 else "open the drawer")
        assert item["episode_index"] == (i >= 9)
    with pytest.raises(SourceError, match=r"another robot \(observation.state"):
        writer(folder, state_size=4)


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SourceError, match="not empty"):
        writer(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_frames_come_at_whole_rates(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="whole number"):
        writer(tmp_path / "data", fps=12.5)
