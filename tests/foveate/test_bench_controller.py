"""`foveate bench controller` and `foveate calibrate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import policies.vla
import sims
from foveate.cli import app
from sims.calibration import Measure, buckets_of, card_of, fitted, whole_ms
from stream.budgets.latency_card import LatencyCard
from stream.errors import ConfigError
from tests.sims.toys import BUCKETS, ToyPolicy, ToyWorld, toy_card

runner = CliRunner()


def run_json(*arguments: str) -> Any:
    result = runner.invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_table_compares_with_fixed_choices() -> None:
    found = run_json("bench", "controller", "--ticks", "400", "--budget-ms", "80")
    assert len(found["rows"]) == 8 * 5
    by_controller = {r["controller"]: r for r in found["rows"] if r["world"] == "stationary"}
    assert by_controller["deadline"]["mean_tokens"] > by_controller["fewest tokens"]["mean_tokens"]
    assert by_controller["all tokens"]["miss_rate"] > by_controller["deadline"]["miss_rate"]
    assert set(found["kept"]) == {r["world"] for r in found["rows"]}
    assert found["card"] == "toy-vla on a made-up device"


def test_a_robots_card_sets_the_budget(tmp_path: Path) -> None:
    toy_card().save(tmp_path / "card.json")
    found = run_json("bench", "controller", "--ticks", "50", "--card", str(tmp_path / "card.json"))
    assert found["budget_ms"] == pytest.approx(1.3 * (10 + 8 + 0.2 * 128 + 2), abs=0.1)
    assert found["card"] == "toy-vla on toy device"


def test_calibrate_writes_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sims, "make", lambda name: ToyWorld())
    monkeypatch.setattr(policies.vla, "load", lambda *given: ToyPolicy(), raising=False)
    file = tmp_path / "cards" / "toy.json"
    options = ["--out", str(file), "--repeats", "4", "--warmup", "1"]
    found = run_json("calibrate", *options, "--buckets", "512,32")
    card = LatencyCard.load(file)
    assert card.buckets == (32, 512)
    assert card.stages == ("encode", "prefill", "act")
    assert {row.count for row in card.timings} == {4}
    assert found["model"] == "tiny-vla, vla_pruner_input"
    assert card.shapes["image"] == (16, 16, 3)
    with pytest.raises(ConfigError, match="must be token counts"):
        run_json("calibrate", *options, "--buckets", "half")
    with pytest.raises(ConfigError, match="above the 512 visual tokens"):
        run_json("calibrate", *options, "--buckets", "1024")


def test_a_measurement_runs_every_stage_at_its_bucket() -> None:
    policy, world = ToyPolicy(steps=(2, 5)), ToyWorld()
    world.reset(0)
    done: list[int] = []
    measure = Measure(policy, world.observe(), done.append)
    times = [measure(bucket) for bucket in (32, 512)]
    assert policy.calls == [
        ("encode", 2), ("prefill", 32), ("act", 5), ("encode", 2), ("prefill", 512), ("act", 5),
    ]  # fmt: skip
    assert all(set(t) == {"encode", "prefill", "act"} for t in times)
    assert done == [1, 2]
    card = card_of(policy, world.observe(), model="toy", repeats=2, warmup=0)
    assert card.buckets == buckets_of(512) == (32, 64, 128, 256, 512)
    assert card.shapes["steps"] == (2, 5)


def test_a_card_is_fitted_by_shares() -> None:
    card = toy_card()
    assert fitted(card, 512) is card
    small = fitted(card, 64)
    assert small.buckets == (4, 16, 64)
    assert small.row("prefill", 16).p50_ms == card.row("prefill", BUCKETS[1]).p50_ms
    assert "512 tokens as 64" in small.label("elsewhere")
    assert whole_ms(small, 64, steps=3) == pytest.approx(10 + 8 + 0.2 * 512 + 6)
