"""Cards: what they hold, what they refuse, and the order in which calibration measures."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.budgets.latency_card import LatencyCard, StageTiming, calibrate, isotonic
from stream.errors import ConfigError, ValueShapeError
from tests.stream.budgets.cards import BUCKETS, card

TEXT = card(count=20).to_json()


def changed(**fields: object) -> str:
    return json.dumps(json.loads(TEXT) | fields)


def with_row(**fields: object) -> str:
    data = json.loads(TEXT)
    data["timings"][0] |= fields
    return json.dumps(data)


def test_a_card_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    card().save(path)
    assert LatencyCard.load(path) == card()
    assert card().to_json() == LatencyCard.load(path).to_json()


def test_a_card_is_made_for_people_too() -> None:
    lines = TEXT.splitlines()
    assert '  "device": "test device",' in lines
    assert sum('"stage": "prefill"' in line for line in lines) == len(BUCKETS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a JSON latency card"),
        ("[]", "refused"),
        ("null", "refused"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
        (" " * (1 << 20) + TEXT, "at most a million"),
        ("9" * 5000, "not a JSON latency card"),
        (TEXT.replace('"threads": 2', '"threads": 2, "threads": 3'), "'threads' appears twice"),
        (changed(version=2), "version"),
        (changed(format="something else"), "format"),
        (changed(colour="red"), "colour"),
        (changed(threads="2"), "threads"),
        (changed(threads=0), "threads"),
        (changed(date="yesterday"), "Invalid isoformat"),
        (changed(shapes={"image": "big"}), "shapes.image"),
        (changed(timings=[]), "timings"),
        (changed(timings=json.loads(TEXT)["timings"][1:]), r"\('encode', 32\) are missing"),
        (changed(timings=json.loads(TEXT)["timings"] * 2), "appear twice"),
        (with_row(p99_ms=float("nan")), "NaN is no time"),
        (with_row(max_ms=float("inf")), "Infinity is no time"),
        (with_row(max_ms=1e999), "Infinity is no time"),
        (with_row(max_ms=7e77).replace("7e+77", "1e999"), "max_ms"),
        (changed(device="\ud800"), "latency card"),
        (with_row(min_ms=-1.0), "min_ms"),
        (with_row(p50_ms=1e6), "must not fall"),
        (with_row(mean_ms=0.0), "the mean of encode"),
        (with_row(bucket=0), "bucket"),
        (with_row(bucket=32.5), "bucket"),
        (with_row(count=True), "count"),
        (with_row(stage="../etc"), "stage"),
    ],
)
def test_a_wrong_card_is_refused_with_a_reason(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LatencyCard.from_json(text)


@given(st.integers(0, len(TEXT) - 3))
def test_a_truncated_card_is_refused(length: int) -> None:
    with pytest.raises(ConfigError):
        LatencyCard.from_json(TEXT[:length])


@given(st.text(max_size=30), st.integers(0, len(TEXT)))
def test_a_damaged_card_is_read_or_refused(text: str, at: int) -> None:
    with contextlib.suppress(ConfigError):
        assert LatencyCard.from_json(TEXT[:at] + text + TEXT[at:]).timings


def test_files_that_are_no_cards(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        LatencyCard.load(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        LatencyCard.load(tmp_path)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="not UTF-8"):
        LatencyCard.load(tmp_path / "bytes.json")


def test_a_row_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"no stage 'decode'.*flow_step.*512"):
        card().row("decode", 64)


def test_another_devices_card_is_called_a_transplant() -> None:
    assert card().label("test device") == "toy-vla on test device"
    assert card().label("laptop") == "latency transplant of toy-vla on test device"


def test_quantiles_are_samples_and_spikes_stay_in() -> None:
    row = StageTiming.of("prefill", 64, [*range(1, 100), 5000.0])
    assert (row.min_ms, row.p50_ms, row.p95_ms, row.p99_ms, row.max_ms) == (1, 51, 96, 5000, 5000)
    assert row.count == 100
    assert row.mean_ms == pytest.approx(99.5)


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=50))
def test_any_samples_make_a_row_whose_quantiles_rise(samples: list[float]) -> None:
    row = StageTiming.of("prefill", 64, samples)
    times = [row.at(level) for level in np.linspace(0, 1, 41)]
    assert times == sorted(times)
    assert (row.at(0), row.at(0.5), row.at(0.99)) == (row.min_ms, row.p50_ms, row.p99_ms)
    assert (row.at(-1), row.at(2)) == (row.min_ms, row.max_ms)


def test_every_round_visits_every_bucket_in_a_new_order() -> None:
    visits: list[int] = []

    def measure(bucket: int) -> dict[str, float]:
        visits.append(bucket)
        return {"prefill": float(len(visits))}

    rows = calibrate(measure, BUCKETS, ["prefill"], repeats=30, warmup=4, seed=3)
    rounds = [tuple(visits[i : i + 5]) for i in range(0, len(visits), 5)]
    assert len(rounds) == 34
    assert all(sorted(r) == list(BUCKETS) for r in rounds)
    assert len(set(rounds)) > 20
    assert Counter(r[0] for r in rounds).most_common(1)[0][1] < 20
    assert [row.count for row in rows] == [30] * 5
    assert min(row.min_ms for row in rows) == 4 * 5 + 1

    again = list(visits)
    visits.clear()
    calibrate(measure, BUCKETS, ["prefill"], repeats=30, warmup=4, seed=3)
    assert visits == again


def test_a_clock_that_drifts_touches_all_buckets_alike() -> None:
    """A machine whose time doubles during calibration and that does not care about tokens."""
    calls = 0

    def measure(bucket: int) -> dict[str, float]:
        nonlocal calls
        calls += 1
        return {"prefill": 10.0 + calls / 100}

    rows = calibrate(measure, BUCKETS, ["prefill"], repeats=200, warmup=0, seed=0)
    means = [row.mean_ms for row in rows]
    assert max(means) - min(means) < 0.05
    assert rows[0].max_ms - rows[0].min_ms > 9


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"prefill": 1.0}, "stages"),
        ({"prefill": 1.0, "head": 1.0, "more": 1.0}, "stages"),
        ({"prefill": float("nan"), "head": 1.0}, "prefill at 32 tokens took nan"),
        ({"prefill": 1.0, "head": -1.0}, "head at 32 tokens took -1"),
    ],
)
def test_a_measurement_that_makes_no_sense(sample: dict[str, float], message: str) -> None:
    with pytest.raises(ValueShapeError, match=message):
        calibrate(lambda bucket: sample, [32], ["prefill", "head"])


@pytest.mark.parametrize(
    ("buckets", "stages", "repeats"),
    [([], ["a"], 1), ([8, 8], ["a"], 1), ([0], ["a"], 1), ([8], [], 1), ([8], ["a"], 0)],
)
def test_a_calibration_that_makes_no_sense(
    buckets: list[int], stages: list[str], repeats: int
) -> None:
    with pytest.raises(ConfigError):
        calibrate(lambda bucket: {"a": 1.0}, buckets, stages, repeats=repeats)


def test_an_error_of_the_measurement_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        calibrate(lambda bucket: {"a": 1 / 0}, [8], ["a"])


pairs = st.lists(st.tuples(st.floats(0, 1e3), st.integers(1, 500)), min_size=1, max_size=12)


@given(pairs)
def test_isotonic_is_the_nearest_that_does_not_fall(drawn: list[tuple[float, int]]) -> None:
    values, weights = [v for v, _ in drawn], [w for _, w in drawn]
    smooth = isotonic(values, weights)
    assert list(smooth) == pytest.approx(sorted(smooth))
    assert np.dot(smooth, weights) == pytest.approx(np.dot(values, weights), abs=1e-6)
    assert isotonic(smooth, weights) == pytest.approx(smooth)
    ascending = sorted(values)
    assert isotonic(ascending, weights) == pytest.approx(ascending)


def test_isotonic_pools_what_falls() -> None:
    assert isotonic([1, 4, 2, 5], [1, 1, 3, 1]) == (1, 2.5, 2.5, 5)
