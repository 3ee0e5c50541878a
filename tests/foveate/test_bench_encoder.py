"""The encoder bench pairs answers by clip and prints what each encoder computes."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from foveate.cli import app
from foveate.encoders import Score


def test_answers_are_paired_by_clip() -> None:
    exact = Score(right=[10, 6, 8], asked=[10, 10, 10])
    worse = Score(right=[9, 5, 7], asked=[10, 10, 10])
    assert worse.accuracy == pytest.approx(70)
    assert worse.minus(exact, seed=0) == pytest.approx((-10, -10, -10))


def test_lean_encoders_stand_beside_the_exact_one() -> None:
    argv = ["bench", "encoder", "--videos", "1", "--frames", "4", "--share", "0.25"]
    argv += ["--refresh", "4", "--threads", "1", "--seed", "3", "--json"]
    result = CliRunner().invoke(app, argv)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    exact, *lean = told["rows"]
    assert (told["n"], told["seed"]) == (12, 3)
    assert (exact["computed"], exact["feature_error"], exact["minus_exact"]) == (1, 0, 0)
    assert [r["encoder"] for r in lean] == ["merge", "skip, share 0.25, refresh 4"]
    assert all(0 < r["computed"] < 1 and 0 < r["feature_error"] < 0.2 for r in lean)


@pytest.mark.parametrize("wrong", [["--share", "0"], ["--refresh", "0"], ["--frames", "1"]])
def test_settings_that_cannot_be_are_refused(wrong: list[str]) -> None:
    result = CliRunner().invoke(app, ["bench", "encoder", *wrong])
    assert result.exit_code != 0
    assert "at least" in str(result.exception)
