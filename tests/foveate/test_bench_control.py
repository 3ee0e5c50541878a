"""`foveate bench control` on a toy world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import policies.vla
import sims
from foveate import control
from foveate.cli import app
from foveate.control import Arm
from stream.errors import ConfigError
from tests.sims.toys import ToyPolicy, ToyWorld, toy_card

runner = CliRunner()
ARMS = "vla_pruner@deadline,vla_pruner@1,vla_pruner@0.0625,oracle,blank"


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sims, "make", lambda name: ToyWorld(max_steps=60))
    monkeypatch.setattr(policies.vla, "load", lambda *given: ToyPolicy(), raising=False)
    for cached in (control._world, control._ready, control._policy):
        cached.cache_clear()


def run(*arguments: str) -> Any:
    options = ["bench", "control", *arguments, "--json"]
    result = runner.invoke(app, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def realtime(tmp_path: Path, *more: str) -> Any:
    toy_card(spread=0.05).save(tmp_path / "card.json")
    return run(
        *("--play", str(tmp_path / "lines.jsonl"), "--arms", ARMS, "--tasks", "toy:a,toy:b"),
        *("--budgets", "40,60", "--time", f"card:{tmp_path / 'card.json'}"),
        *("--baseline", "vla_pruner@1", *more),
    )


def test_success_against_milliseconds(tmp_path: Path) -> None:
    found = realtime(tmp_path, "--episodes", "3", "--plot", str(tmp_path / "out.png"))
    rows = {(r["method"], r["keep"], r["budget_ms"]): r for r in found["rows"]}
    assert len(rows) == 3 * 2 + 2
    assert all(r["n"] == 6 for r in rows.values())
    assert rows["oracle", 1, None]["score"] > 0.7
    assert rows["blank pictures", 1, None]["score"] < 0.1
    for budget in (40, 60):
        deadline, full = (rows["vla_pruner", keep, budget] for keep in (None, 1))
        assert deadline["missed"] == 0
        assert full["missed"] > 0.5
        assert deadline["score"] > full["score"]
        assert deadline["time_source"] == "latency transplant of toy-vla on toy device"
        assert (deadline["pairs"], deadline["lost"]) == (6, 0)
    assert (tmp_path / "out.png").stat().st_size > 5000


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    realtime(tmp_path, "--episodes", "1")
    file = tmp_path / "lines.jsonl"
    lines = file.read_text().splitlines()
    assert len(lines) == 2 * (3 * 2 + 2)
    file.write_text("\n".join(lines[:5]) + "\n" + lines[5][:30])
    realtime(tmp_path, "--episodes", "1")
    assert sorted(file.read_text().splitlines()) == sorted(lines)
    before = file.read_text()
    realtime(tmp_path, "--episodes", "1")
    assert file.read_text() == before


def test_the_world_that_waits(tmp_path: Path) -> None:
    arms = "vla_pruner:mode=paper@0.25,random_keep@1"
    played = ["--play", str(tmp_path / "w.jsonl"), "--tasks", "toy:a", "--episodes", "2"]
    found = run(*played, "--arms", arms)
    assert [(r["method"], r["keep"], r["mode"], r["tokens"]) for r in found["rows"]] == [
        ("random_keep", 1, "waiting", 512),
        ("vla_pruner:mode=paper", 0.25, "waiting", 128),
    ]
    result = runner.invoke(app, ["bench", "control", str(tmp_path / "w.jsonl")])
    assert "waiting, 1 tasks, seeds 0 to 1" in result.stdout
    only = runner.invoke(app, ["bench", "control", str(tmp_path / "w.jsonl"), "--only", "toy:z"])
    assert isinstance(only.exception, ConfigError)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--arms", "vla_pruner"], "must be METHOD@SHARE"),
        (["--arms", "vla_pruner@2"], "must be METHOD@SHARE"),
        (["--arms", "vla_pruner@deadline"], "needs --budgets"),
        (["--arms", "vla_pruner:mod=paper@1"], "mod"),
        (["--budgets", "soon"], "milliseconds like 40,80"),
        (["--budgets", "40", "--workers", "2"], "wall clock is right with --workers 1"),
    ],
)
def test_wrong_runs(arguments: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        run("--play", str(tmp_path / "x.jsonl"), "--tasks", "toy:a", *arguments)
    with pytest.raises(ConfigError, match="no outcomes"):
        run()


def test_arms() -> None:
    assert Arm.of("a:b=1@0.5") == Arm("a:b=1", 0.5)
    assert Arm.of("a@deadline") == Arm("a", None)
    assert Arm.of("oracle").is_control
    assert Arm.of("blank").method == "blank pictures"
