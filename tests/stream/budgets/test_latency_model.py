"""Forecasts: monotone, quick to see a change, exceeded at the stated rate."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.budgets.latency_model import (
    LatencyModel,
    LatencyState,
    ModelConfig,
    Point,
    Stages,
)
from stream.config import parse
from stream.errors import ConfigError
from tests.stream.budgets.cards import AFFINE_MS, BUCKETS, card

STAGES = Stages()
STEPS = 10


def model(spread: float = 0.05, **settings: float) -> LatencyModel:
    config = ModelConfig(**settings)  # type: ignore[arg-type]
    return LatencyModel.of(card(spread), STAGES, config, "test device", STEPS)


def tick(bucket: int, factor: float = 1.0, noise: float = 0.0) -> dict[str, float]:
    times = {}
    for stage in STAGES.names:
        base, slope = AFFINE_MS[stage]
        repeats = STEPS if stage == "flow_step" else 1
        times[stage] = (base + slope * BUCKETS[bucket]) * repeats * factor * math.exp(noise)
    return times


def after(m: LatencyModel, state: LatencyState, *factors: float, bucket: int = 2) -> LatencyState:
    for factor in factors:
        times = tick(bucket, factor)
        state = m.observe(state, bucket, STEPS, times, sum(times.values()))
    return state


def test_a_fresh_forecast_is_the_cards_high_quantile() -> None:
    m = model()
    forecast = m.predict_ms(m.start(), 2, STEPS, Point.ENCODE)
    usual = sum(tick(2).values())
    assert 1.08 * usual < forecast < 1.2 * usual


@given(st.integers(0, 1000), st.lists(st.floats(0.1, 10), max_size=5))
def test_it_grows_with_bucket_and_steps_however_noisy_the_card(
    seed: int, factors: list[float]
) -> None:
    m = LatencyModel.of(card(0.5, 5, seed=seed), STAGES, ModelConfig(), "test device")
    state = after(m, m.start(), *factors)
    for point in Point:
        by_bucket = [m.predict_ms(state, b, 4, point) for b in range(len(BUCKETS))]
        by_steps = [m.predict_ms(state, 1, n, point) for n in range(1, 11)]
        assert by_bucket == pytest.approx(sorted(by_bucket))
        assert by_steps == sorted(by_steps)


def test_a_doubling_is_in_the_next_forecast() -> None:
    m = model()
    state = after(m, m.start(), *[1.0] * 50)
    before = m.predict_ms(state, 2, STEPS, Point.ENCODE)
    for point in Point:
        usual = m.predict_ms(state, 2, STEPS, point)
        assert m.predict_ms(after(m, state, 2.0), 2, STEPS, point) > 1.9 * usual
    assert m.predict_ms(after(m, state, *[2.0] * 5), 4, STEPS, Point.ENCODE) > 1.9 * before


def test_one_spike_is_forgotten_in_a_few_ticks() -> None:
    m = model()
    state = after(m, m.start(), *[1.0] * 50)
    before = m.predict_ms(state, 2, STEPS, Point.ENCODE)
    for spike in (2.0, 20.0):
        spiked = after(m, state, spike, *[1.0] * 3)
        assert m.predict_ms(spiked, 2, STEPS, Point.ENCODE) < 1.1 * before


def test_a_slow_stage_is_told_apart_from_a_slow_machine() -> None:
    m = model()
    state = m.start()
    for _ in range(50):
        times = tick(2) | {"prefill": 3 * tick(2)["prefill"]}
        state = m.observe(state, 2, STEPS, times, sum(times.values()))
    drift = dict(zip(m.stages, state.drift, strict=True))
    assert drift["prefill"] == pytest.approx(3, rel=0.03)
    assert drift["flow_step"] == pytest.approx(1, rel=0.03)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=10))
def test_drift_and_forecast_stay_bounded(factors: list[float]) -> None:
    m = model(drift_limit=4.0)
    state = after(m, m.start(), *factors)
    assert all(0.25 - 1e-9 <= factor <= 4 + 1e-9 for factor in state.drift)
    assert 0 < m.predict_ms(state, 4, STEPS, Point.ENCODE) < math.inf


def test_a_stage_that_does_not_run_moves_towards_the_card() -> None:
    m = model()
    state = after(m, m.start(), *[3.0] * 20)
    slow = dict(zip(m.stages, state.drift, strict=True))
    for _ in range(20):
        times = {k: v for k, v in tick(2, 3.0).items() if k in ("flow_step", "action_head")}
        state = m.observe(state, 2, STEPS, times, sum(times.values()))
    drift = dict(zip(m.stages, state.drift, strict=True))
    assert drift["flow_step"] == pytest.approx(slow["flow_step"], abs=1e-6)
    assert drift["prefill"] < slow["prefill"] ** 0.2


def test_a_tick_cut_short_leaves_no_score() -> None:
    m = model()
    start = m.start()
    state = m.observe(start, 2, STEPS, {"prefill": 10.0, "unknown": 3.0}, 10.0)
    for margin, before in zip(state.margins, start.margins, strict=True):
        assert margin.scores == before.scores
    assert state.drift != start.drift


def test_gaps_between_stages_are_part_of_the_forecast() -> None:
    m = model()
    state = m.start()
    for _ in range(600):
        times = tick(2)
        state = m.observe(state, 2, STEPS, times, sum(times.values()) + 10)
    assert m.predict_ms(state, 2, STEPS, Point.ENCODE) > sum(tick(2).values()) + 9.5


@pytest.mark.parametrize("kind", ["stationary", "drifting", "spikes", "doubling", "wrong card"])
@pytest.mark.parametrize("target", [0.01, 0.05])
def test_forecasts_are_exceeded_at_the_target_rate(kind: str, target: float) -> None:
    ticks = 6000
    rng = np.random.default_rng(11)
    when = np.arange(ticks)
    factor = {
        "stationary": np.ones(ticks),
        "drifting": 1.5 ** np.sin(when / 400),
        "spikes": np.where(rng.random(ticks) < 0.08, 2.0, 1.0),
        "doubling": np.where(when < ticks // 2, 1.0, 2.0),
        "wrong card": np.full(ticks, 3.0),
    }[kind]
    noise = rng.normal(0, 0.08, ticks)
    bucket = rng.integers(0, len(BUCKETS), ticks)
    m = model(target_miss=target)
    state = m.start()
    exceeded = 0
    for b, f, e in zip(bucket.tolist(), factor.tolist(), noise.tolist(), strict=True):
        times = tick(b, f, e)
        took = sum(times.values())
        exceeded += took > m.predict_ms(state, b, STEPS, Point.ENCODE)
        state = m.observe(state, b, STEPS, times, took)
    assert 0.6 * target < exceeded / ticks < 1.4 * target


def test_a_card_without_the_stage_is_refused() -> None:
    with pytest.raises(ConfigError, match="no stage 'decode'; it has encode"):
        LatencyModel.of(card(), Stages(step="decode"), ModelConfig(), "test device")


def test_another_devices_card_is_labelled() -> None:
    m = LatencyModel.of(card(), STAGES, ModelConfig(), "laptop")
    assert m.source == "latency transplant of toy-vla on test device"


@pytest.mark.parametrize("text", ["prefix: [a, a]", "{prefix: [], step: null, tail: []}"])
def test_stages_are_distinct_and_not_none(text: str) -> None:
    with pytest.raises(ConfigError, match="at least one and distinct"):
        parse(text, Stages)


def test_a_model_without_repeats_or_tail() -> None:
    stages = Stages(prefix=("prefill",), step=None, tail=())
    m = LatencyModel.of(card(), stages, ModelConfig(), "test device")
    state = m.observe(m.start(), 2, 1, {"prefill": 27.0}, 27.0)
    assert m.predict_ms(state, 2, 1, Point.ENCODE) > 27
    assert m.predict_ms(state, 2, 1, Point.PREFILL) < 0.01
