"""What is written of an episode can be read back."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest

from sims.clock import STAGES, CardTime
from sims.episode import DriveConfig, Episode
from stream.budgets.controller import ControllerConfig, DeadlineController
from stream.errors import ConfigError, SourceError
from stream.plan import Plan
from stream.sinks.base import TickSink
from stream.sinks.film import Film
from stream.sinks.jsonl import JsonLines, read
from stream.sinks.lerobot_ticks import LeRobotTicks
from stream.sinks.rerun_log import RerunLog
from stream.sinks.tick_paint import caption, painted
from stream.ticks import Tick
from tests.sims.toys import CAMERAS, DT_S, GRID, SIDE, ToyPolicy, ToyWorld, toy_card

ABOUT = {
    "environment": "toy:follow",
    "cameras": {camera: [SIDE, SIDE] for camera in CAMERAS},
    "grid": [GRID.frames, GRID.rows, GRID.cols],
    "state_size": 2,
    "action_size": 3,
    "dt_s": DT_S,
}


@pytest.fixture(scope="module")
def ticks() -> list[Tick]:
    """With a dark spell, a numb one, and all the rest."""
    world = ToyWorld(max_steps=60, dark=range(20, 30), half=range(30, 40), numb=range(45, 50))
    card = toy_card()
    controller = DeadlineController.of(card, STAGES, "toy device", ControllerConfig(stop_after=40))
    clock = CardTime(card, "toy")
    config = DriveConfig(budget_ms=60)
    return list(Episode(world, ToyPolicy(), controller, clock, config, film=True).run(1))


def put(sink: TickSink, ticks: list[Tick], episodes: int = 1) -> None:
    with sink:
        for _ in range(episodes):
            sink.begin(ABOUT)
            for tick in ticks:
                sink.write(tick)
            sink.end({"success": ticks[-1].success})


def test_json_lines_are_read_back(ticks: list[Tick], tmp_path: Path) -> None:
    put(JsonLines(tmp_path / "run"), ticks, episodes=2)
    first, second = read(tmp_path / "run")
    assert first.about == ABOUT
    assert first.summary == {"success": False}
    assert first.ticks == second.ticks
    assert len(first.ticks) == len(ticks)
    for tick, record in zip(ticks, first.ticks, strict=True):
        observation = first.observation(record)
        assert (observation is None) == (tick.observation is None)
        if observation is not None and tick.observation is not None:
            np.testing.assert_array_equal(observation.state, tick.observation.state)
            for camera, image in tick.observation.images.items():
                np.testing.assert_array_equal(observation.images[camera], image)
        if tick.plan is not None:
            assert Plan.from_record(record["plan"]).same_as(tick.plan)
        assert record["decision"]["why"] == tick.decision.why
        assert record["elapsed_ms"] == pytest.approx(tick.elapsed_ms, abs=1e-3)
    assert any(r["said"] for r in first.ticks)
    assert read(tmp_path / "run" / "episode_0001") == (second,)


def test_a_killed_recording_is_readable(ticks: list[Tick], tmp_path: Path) -> None:
    sink = JsonLines(tmp_path)
    sink.begin(ABOUT)
    sink.write(ticks[0])
    sink.write(ticks[1])
    file = tmp_path / "episode_0000" / "ticks.jsonl"
    whole = file.read_bytes()
    assert len(whole.splitlines()) == 3
    file.write_bytes(whole[:-10])
    (killed,) = read(tmp_path)
    assert len(killed.ticks) == 1
    assert killed.summary is None


def test_recordings_that_cannot_be_read_or_written(ticks: list[Tick], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no recorded episode"):
        read(tmp_path)
    put(JsonLines(tmp_path), ticks[:1])
    with pytest.raises(SourceError, match="is not empty"):
        JsonLines(tmp_path)
    (tmp_path / "episode_0000" / "frames" / "000000_top.png").unlink()
    (episode,) = read(tmp_path)
    with pytest.raises(SourceError, match=r"000000_top\.png cannot be read"):
        episode.observation(episode.ticks[0])
    (tmp_path / "episode_0000" / "ticks.jsonl").write_text("[1]\n")
    with pytest.raises(SourceError, match="no record"):
        read(tmp_path)


def test_infinite_limits_are_null(tmp_path: Path) -> None:
    card = toy_card()
    controller = DeadlineController.of(card, STAGES, "x")
    episode = Episode(ToyWorld(), ToyPolicy(), controller, CardTime(card, ""), DriveConfig())
    put(JsonLines(tmp_path), [next(episode.run(1))])
    (line,) = read(tmp_path)[0].ticks
    assert line["deadline_ms"] is None
    assert line["decision"]["slack_ms"] is None
    assert json.dumps(line, allow_nan=False)


def test_kept_patches_are_bright_and_dropped_ones_dark(ticks: list[Tick]) -> None:
    tick = ticks[0]
    assert tick.plan is not None
    view = painted(tick)["top"]
    assert view is not None
    kept = int(tick.plan.anchor[tick.plan.anchor < 256][0])
    dropped = next(i for i in range(256) if i not in tick.plan.anchor.tolist())
    cell = view.shape[0] // 16

    def middle(i: int) -> float:
        y, x = divmod(i, 16)
        return float(view[y * cell + cell // 2, x * cell + cell // 2].mean())

    assert middle(kept) > middle(dropped)
    assert "tokens" in caption(tick)
    dark = next(t for t in ticks if t.first_step in range(20, 30))
    assert painted(dark) == dict.fromkeys(CAMERAS)


def test_a_film_lasts_as_long_as_the_episode(ticks: list[Tick], tmp_path: Path) -> None:
    put(Film(tmp_path / "out.mp4"), ticks, episodes=2)
    with av.open(str(tmp_path / "out.mp4")) as film:
        times = [float(frame.time) for frame in film.decode(video=0)]
        assert film.streams.video[0].width >= 2 * 256
    assert len(times) == 2 * (len(ticks) + 2)
    assert times == sorted(times)
    assert times[1] - times[0] == pytest.approx(ticks[1].time_s, abs=0.002)
    assert times[-1] == pytest.approx(2 * 60 * DT_S + 1.0, abs=0.05)
    with pytest.raises(ConfigError, match=r"\.mp4"):
        Film(tmp_path / "out.avi")


def test_an_empty_film_closes(tmp_path: Path) -> None:
    path = tmp_path / "none.mp4"
    Film(path).close()
    assert not path.exists()


def test_rerun_is_read_back(ticks: list[Tick], tmp_path: Path) -> None:
    put(RerunLog(tmp_path / "out.rrd"), ticks)
    from rerun.chunk import RrdReader

    rows: dict[str, int] = {}
    values: list[float] = []
    for chunk in RrdReader(str(tmp_path / "out.rrd")).stream().to_chunks():
        rows[chunk.entity_path] = rows.get(chunk.entity_path, 0) + chunk.num_rows
        if chunk.entity_path.endswith("latency/took_ms"):
            column = chunk.to_record_batch().column("Scalars:scalars")
            values += [v[0] for v in column.to_pylist()]
    seen = sum(t.observation is not None and t.observation.images["top"] is not None for t in ticks)
    assert rows["/episode_0/camera/top"] == seen
    assert rows["/episode_0/log"] == len(ticks) + 1
    assert sorted(values) == pytest.approx(sorted(t.elapsed_ms for t in ticks))
    with pytest.raises(ConfigError, match=r"\.rrd"):
        RerunLog(tmp_path / "out.txt")


def test_a_lerobot_dataset_holds_the_keep_mask(ticks: list[Tick], tmp_path: Path) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    put(LeRobotTicks(tmp_path / "set"), ticks)
    data = LeRobotDataset("local/set", root=tmp_path / "set", video_backend="pyav")
    assert len(data) == sum(len(t.executed) for t in ticks) == 60
    assert data.fps == 80
    first = data[0]
    assert first["task"] == "follow the light"
    assert first["keep_mask"].sum() == first["tokens"] == ticks[0].decision.tokens
    np.testing.assert_allclose(first["action"].numpy(), ticks[0].executed[0])
    half = next(t for t in ticks if t.cameras == ("top",))
    mask = data[half.first_step]["keep_mask"]
    assert mask[0].sum() > 0
    assert mask[1].sum() == 0
    picture = data[half.first_step]["observation.images.back"]
    assert picture.max() < 0.1
