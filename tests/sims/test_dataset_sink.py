"""A driven episode as a LeRobotDataset with what the policy kept of each picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sims.clock import STAGES, CardTime
from sims.episode import DriveConfig, Episode
from stream.budgets.controller import ControllerConfig, DeadlineController
from stream.sinks.lerobot_dataset import Dataset
from tests.sims.toys import CAMERAS, DT_S, GRID, ToyPolicy, ToyWorld, toy_card


def test_lerobot_reads_actions_pictures_and_keep_masks(tmp_path: Path) -> None:
    world = ToyWorld(max_steps=40, half=range(20, 30))
    card = toy_card()
    controller = DeadlineController.of(card, STAGES, "toy device", ControllerConfig())
    episode = Episode(
        world, ToyPolicy(), controller, CardTime(card, "toy"), DriveConfig(budget_ms=60), film=True
    )
    about = {"environment": "toy:follow", "cameras": list(CAMERAS), "dt_s": DT_S}
    with Dataset(tmp_path / "data") as sink:
        sink.begin(about)
        ticks = []
        for tick in episode.run(1):
            ticks.append(tick)
            sink.write(tick)
        sink.end({})

    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("local/data", root=tmp_path / "data", video_backend="pyav")
    frames = [
        (tick, *pair) for tick in ticks for pair in zip(tick.seen, tick.executed, strict=True)
    ]
    assert len(dataset) == len(frames) == world.steps
    assert dataset.num_episodes == 1
    blind = 0
    for i, (tick, seen, action) in enumerate(frames):
        item = dataset[i]
        np.testing.assert_array_equal(item["action"], action)
        np.testing.assert_array_equal(item["observation.state"], seen.state)
        kept = {camera: item[f"keep.{camera}"].numpy() for camera in CAMERAS}
        assert kept["top"].shape == (GRID.rows, GRID.cols)
        if tick.plan is not None:
            assert sum(mask.sum() for mask in kept.values()) == tick.plan.k
        if seen.images["back"] is None:
            assert item["observation.images.back"].max() < 0.05
            blind += 1
    assert blind == 10
