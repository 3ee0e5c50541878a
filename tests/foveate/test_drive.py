"""`foveate drive` on a toy world, as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import policies.vla
import sims
from foveate.cli import app
from foveate.neighbour import Neighbour
from policies.graphs.capture import Program
from policies.vla.base import Scene
from sims.calibration import WARM_ROUNDS
from stream.data import Observation
from stream.errors import AttachError, ConfigError, UnknownNameError
from stream.sinks.jsonl import read
from tests.policies.graphs.taped import TapedPool
from tests.sims.toys import ToyPolicy, ToyWorld, toy_card

runner = CliRunner()


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sims, "make", lambda name: ToyWorld(max_steps=80))
    monkeypatch.setattr(policies.vla, "load", lambda *given: ToyPolicy(), raising=False)


def run(*arguments: str) -> Any:
    result = runner.invoke(app, ["drive", "toy", *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_stated_time(tmp_path: Path) -> None:
    found = run("--time", "ms:60", "--budget-ms", "80", "--episodes", "2", "--seed", "5")
    assert [e["seed"] for e in found["episodes"]] == [5, 6]
    assert found["time_source"] == "stated: 60 ms"
    assert found["all"]["ms"]["whole"] == {"p50": 60, "p95": 60, "p99": 60}
    assert found["all"]["steps"] == 160
    assert found["all"]["held_steps"] >= 10
    assert sum(found["all"]["rungs"].values()) == found["all"]["ticks"]


def test_the_same_command_prints_the_same(tmp_path: Path) -> None:
    assert run("--time", "ms:32=20,512=90", "--budget-ms", "60") == run(
        "--time", "ms:32=20,512=90", "--budget-ms", "60"
    )


def test_a_card_of_another_device_is_called_a_transplant(tmp_path: Path) -> None:
    toy_card(spread=0.1).save(tmp_path / "card.json")
    found = run("--time", f"card:{tmp_path / 'card.json'}")
    assert found["time_source"] == "latency transplant of toy-vla on toy device"
    assert found["budget_ms"] == pytest.approx(1.3 * (10 + 8 + 0.2 * 128 + 2), rel=0.05)
    assert "128" in found["all"]["buckets"]


def test_the_wall_is_calibrated_once(tmp_path: Path) -> None:
    first = run("--budget-ms", "100")
    again = run("--budget-ms", "100")
    assert "calibrated just now" in first["card"]
    (card,) = (tmp_path / "cache" / "cards").glob("*.json")
    assert str(card) in again["card"]
    assert "delete it to calibrate again" in again["card"]
    assert set(first["all"]["ms"]) == {"encode", "prefill", "act", "whole"}


def test_what_acts_alike_is_calibrated_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` is `on` or `off`, as the device has it."""
    for made in (ToyPolicy, Capturing):
        monkeypatch.setattr(policies.vla, "load", lambda *given, made=made: made())
        for word in ("auto", "off", "on"):
            run("--budget-ms", "100", "--set", f"capture={word}")
    assert len(list((tmp_path / "cache" / "cards").iterdir())) == 2


@pytest.mark.parametrize("word", ["auto", "on", "off"])
def test_all_that_is_decided_is_warm_before_the_clock_runs(
    word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, given = ToyPolicy(), []
    monkeypatch.setattr(policies.vla, "load", lambda *asked: given.append(asked) or policy)
    run("--budget-ms", "100", "--keep", "0.3", "--set", f"capture={word}")
    tokens = [what for call, what in policy.calls if call == "prefill"]
    assert given[0][3] == word
    warmed = 6 * WARM_ROUNDS
    assert tokens[:warmed] == [32, 64, 128, 154, 256, 512] * WARM_ROUNDS
    assert set(tokens[warmed:]) <= {32, 64, 128, 154, 256, 512}
    assert tokens[-1] == 154


class Capturing(ToyPolicy):
    """Has a program for each number of cameras."""

    def __init__(self) -> None:
        super().__init__()
        pool = TapedPool("cpu")
        self.captured = SimpleNamespace(pool=pool)
        self.eyes = {n: Program(pool, f"{n} cameras", lambda x: (x * 1,)) for n in (1, 2)}

    def encode(self, observation: Observation) -> Scene:
        scene = super().encode(observation)
        self.eyes[len(scene.cameras)](scene.x)
        return scene


@pytest.mark.parametrize("half", [range(0), range(20, 50)])
def test_a_camera_that_fails_costs_no_capture_while_the_robot_waits(
    half: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Capturing()
    monkeypatch.setattr(policies.vla, "load", lambda *given: policy)
    monkeypatch.setattr(sims, "make", lambda name: ToyWorld(max_steps=80, half=half))
    found = run("--budget-ms", "100")
    assert policy.captured.pool.captured == 1
    assert (0 < found["uncaptured_inferences"] < found["all"]["inferences"]) == bool(half)
    result = runner.invoke(app, ["drive", "toy", "--budget-ms", "100"], catch_exceptions=False)
    assert ("inferences ran without captured graphs" in result.stdout) == bool(half)


def test_fixed_tokens_and_the_world_that_waits() -> None:
    found = run("--time", "ms:60", "--mode", "waiting", "--keep", "0.25")
    assert found["budget_ms"] is None
    assert found["all"]["buckets"] == {"128": 10}
    assert (found["all"]["held_steps"], found["all"]["misses"]) == (0, 0)


def test_everything_is_written(tmp_path: Path) -> None:
    places = [str(tmp_path / name) for name in ("rec", "out.rrd", "out.mp4")]
    options = ["--record", places[0], "--rerun", places[1], "--video", places[2]]
    found = run("--time", "ms:60", *options)
    (episode,) = read(tmp_path / "rec")
    assert episode.summary == found["episodes"][0]
    assert episode.about["time_source"] == found["time_source"]
    assert len(episode.ticks) == found["all"]["ticks"]
    assert all(Path(p).stat().st_size > 1000 for p in places[1:])


def test_ctrl_c_says_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stubborn(ToyPolicy):
        def encode(self, observation: Observation) -> Scene:
            if len(self.calls) > 150:
                raise KeyboardInterrupt
            return super().encode(observation)

    monkeypatch.setattr(policies.vla, "load", lambda *given: Stubborn())
    options = ["--time", "ms:60", "--episodes", "9", "--record", str(tmp_path / "rec"), "--json"]
    result = runner.invoke(app, ["drive", "toy", *options])
    assert result.exit_code == 130
    found = json.loads(result.stdout)
    *whole, cut = read(tmp_path / "rec")
    assert [episode.summary for episode in whole] == found["episodes"]
    assert found["episodes"]
    assert cut.summary is None
    assert found["all"]["ticks"] == sum(len(r.ticks) for r in (*whole, cut)) > 40


def test_tables_are_printed() -> None:
    result = runner.invoke(app, ["drive", "toy", "--time", "ms:60"], catch_exceptions=False)
    assert result.exit_code == 0
    for expected in ("follow the light", "p99", "stated: 60 ms", "Decided"):
        assert expected in result.stdout


@pytest.mark.parametrize(("budget_ms", "told"), [("80", False), ("5000", True)])
def test_a_budget_beyond_a_chunk_is_told(budget_ms: str, told: bool) -> None:
    result = runner.invoke(app, ["drive", "toy", "--time", "ms:60", "--budget-ms", budget_ms])
    assert result.exit_code == 0
    assert ("lets the robot stand" in " ".join(result.stderr.split())) == told


def test_a_neighbour_comes_and_goes() -> None:
    found = run("--budget-ms", "200", "--disturb", "12")
    assert found["disturbed"]["switched_every"] == 12
    assert found["disturbed"]["inferences_after_adaptation"] > 0
    with Neighbour() as neighbour:
        neighbour.switch(True)
        (process,) = neighbour._running
        neighbour.switch(True)
        assert neighbour._running == [process]
        assert process.poll() is None
    assert process.poll() is not None
    assert not neighbour.on


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (["--time", "sundial"], ConfigError, "none of wall, card:FILE, ms:60"),
        (["--time", "card:nowhere.json"], ConfigError, "nowhere.json cannot be read"),
        (["--budget-ms", "0"], ConfigError, "greater than 0"),
        (["--mode", "patient"], ConfigError, "realtime"),
        (["--reducer", "vla_prner"], UnknownNameError, "vla_pruner"),
        (["--set", "floor_tokens=9999", "--time", "ms:60"], ConfigError, "above the largest"),
    ],
)
def test_wrong_options(arguments: list[str], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        runner.invoke(app, ["drive", "toy", *arguments], catch_exceptions=False)


def test_a_missing_policy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(AttachError, match="no policy 'nowhere'"):
        runner.invoke(app, ["drive", "pusht", "--model", "nowhere"], catch_exceptions=False)
