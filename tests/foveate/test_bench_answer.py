"""The answer bench times both ways of answering the same requests."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from foveate.cli import app
from foveate.timing.answers import STAGES


@pytest.mark.parametrize("model", ["tiny-llava", "tiny-qwen2.5-vl"])
def test_both_ways_are_timed(model: str) -> None:
    argv = ["bench", "answer", "--model", model, "--frames", "2", "--tokens", "3", "--device"]
    argv += ["cpu", "--threads", "1", "--repeats", "2", "--questions", "2", "--seed", "3", "--json"]
    result = CliRunner().invoke(app, argv)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["n"], told["seed"], told["questions"]) == (2, 3, 2)
    assert [row["capture"] for row in told["rows"]] == ["off", "on"]
    for row in told["rows"]:
        assert [spent.keys() for spent in row["early_requests_ms"]] == [row["ms"].keys()] * 2
        assert set(row["ms"]) == set(STAGES)
        assert row["ms_a_token"] == pytest.approx(row["ms"]["decode_tokens"] / 2)
        assert row["whole_ms_range"][0] <= row["whole_ms"] <= row["whole_ms_range"][1]


@pytest.mark.parametrize("wrong", [["--tokens", "1"], ["--questions", "4"], ["--repeats", "1"]])
def test_settings_that_cannot_be_are_refused(wrong: list[str]) -> None:
    result = CliRunner().invoke(app, ["bench", "answer", *wrong])
    assert result.exit_code != 0
    assert "at least 2" in str(result.exception)
