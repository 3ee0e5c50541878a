"""`foveate demos` and `foveate bench experts` as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import sims
from foveate.cli import app
from sims.demos import FIRST_SEED, Noise, demonstrate
from stream.errors import ConfigError, SimulatorError

pytestmark = pytest.mark.usefixtures("pictures")
runner = CliRunner()


def run(*arguments: str) -> str:
    result = runner.invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_recorded_episode_is_what_lerobot_opens(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    command = ("demos", "metaworld:reach", "--out", str(folder), "--json", "--episodes")
    assert json.loads(run(*command, "1"))["episodes"] == 1
    record = json.loads(run(*command, "2"))
    assert record["tasks"]["metaworld:reach"] == {"recorded": 2, "dropped": 0}

    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("local/data", root=folder, video_backend="pyav")
    row = 0
    with sims.make("metaworld:reach") as env:
        for seed in (FIRST_SEED, FIRST_SEED + 1):
            shown = demonstrate(env, seed, Noise())
            assert shown is not None
            for images, state, action in zip(shown.images, shown.state, shown.action, strict=True):
                item = dataset[row]
                for camera, image in zip(env.spec.cameras, images, strict=True):
                    seen = item[f"observation.images.{camera}"].numpy().transpose(1, 2, 0) * 255
                    assert np.abs(seen - image).mean() < 6
                np.testing.assert_array_equal(item["observation.state"], state)
                np.testing.assert_array_equal(item["action"], action)
                assert item["task"] == shown.instruction
                row += 1
    assert row == len(dataset)
    with pytest.raises(ConfigError, match="was begun with"):
        run(*command, "3", "--noise", "0")


def test_what_cannot_be_recorded_says_why(tmp_path: Path) -> None:
    with pytest.raises(SimulatorError, match="no scripted expert"):
        run("demos", "pusht", "--out", str(tmp_path / "data"))
    with pytest.raises(ConfigError, match="by comma"):
        run("demos", "metaworld:reach", "--out", str(tmp_path / "data"), "--noise", "much")


def test_experts_are_measured_against_standing_still() -> None:
    record = json.loads(run("bench", "experts", "metaworld:reach", "--episodes", "5", "--json"))
    (row,) = record["experts"]
    assert (row["solved"], row["standing still"], row["episodes"]) == (5, 0, 5)
    assert 5 < row["steps p50"] <= row["steps p95"] < row["limit"]
