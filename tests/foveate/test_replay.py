"""`foveate replay` of a toy episode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import policies.vla
import sims
from foveate.cli import app
from sims.replay import overlap
from stream.errors import ConfigError, SourceError
from stream.plan import Plan
from tests.sims.toys import ToyPolicy, ToyWorld

runner = CliRunner()


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    world = ToyWorld(max_steps=80, dark=range(20, 30), numb=range(40, 44))
    monkeypatch.setattr(sims, "make", lambda name: world)
    monkeypatch.setattr(policies.vla, "load", lambda *given: ToyPolicy(), raising=False)


def run(*arguments: str) -> Any:
    result = runner.invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def record(tmp_path: Path) -> str:
    folder = str(tmp_path / "rec")
    stated = ["--time", "ms:32=20,128=35,512=90", "--keep", "0.25", "--budget-ms", "60"]
    run("drive", "toy", "--episodes", "2", "--record", folder, *stated)
    return folder


def test_the_same_share_changes_nothing(record: str, tmp_path: Path) -> None:
    found = run("replay", record, "--keeps", "0.25,0.004", "--plot", str(tmp_path / "out.png"))
    same, few = found["choices"]
    assert (same["choice"], same["action L2"], same["largest"], same["overlap"]) == (
        "25 % kept",
        0,
        0,
        1,
    )
    assert few["tokens"] == 2
    assert few["largest"] > 0.01
    assert same["compared"] == few["compared"] > 10
    blind = [c for c in few["ticks"] if c["action_l2"] is None]
    assert blind
    assert all(c["tokens_then"] == 0 for c in blind)
    assert (tmp_path / "out.png").stat().st_size > 3000


def test_budgets_choose_buckets(record: str) -> None:
    found = run("replay", record, "--budgets", "25,50,120")
    assert [c["choice"] for c in found["choices"]] == ["25 ms", "50 ms", "120 ms"]
    tokens = [c["tokens"] for c in found["choices"]]
    assert tokens[0] < tokens[1] < tokens[2]
    assert "stated: 32=20,128=35,512=90 ms" in found["times"]
    assert run("replay", record, "--budgets", "25,50,120") == found


def test_tables_say_where(record: str) -> None:
    result = runner.invoke(app, ["replay", record, "--keeps", "1"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "where the actions change most" in result.stdout
    assert "128 -> 512" in result.stdout


def test_wrong_replays(record: str, tmp_path: Path) -> None:
    for arguments, error, says in (
        ([str(tmp_path)], SourceError, "holds no recorded episode"),
        ([record, "--budgets", "soon"], ConfigError, "must be numbers"),
        ([record, "--keeps", "3"], ConfigError, "keep"),
    ):
        with pytest.raises(error, match=says):
            runner.invoke(app, ["replay", *arguments], catch_exceptions=False)


def test_overlap_is_of_the_smaller_set() -> None:
    few, many = (Plan.keep(torch.tensor(i), 10) for i in ([1, 2], [2, 3, 4, 5]))
    assert overlap(few, many) == overlap(many, few) == 0.5
    assert overlap(few, Plan.identity(10)) == 1
    assert overlap(few, Plan.identity(9)) is None
