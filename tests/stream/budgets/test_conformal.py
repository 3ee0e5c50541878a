"""The margin is exceeded as often as it says."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import Generator

from stream.budgets.conformal import Margin

TICKS = 4000
Draw = Callable[[Generator, int], np.ndarray]


def normal(rng: Generator, n: int) -> np.ndarray:
    return rng.normal(0, 0.05, n)


def skewed(rng: Generator, n: int) -> np.ndarray:
    return np.log(rng.gamma(2.0, size=n))


def two_humps(rng: Generator, n: int) -> np.ndarray:
    return rng.normal(0, 0.05, n) + math.log(2) * (rng.random(n) < 0.03)


def exceeded(margin: Margin, scores: np.ndarray) -> tuple[Margin, np.ndarray]:
    missed = []
    for score in scores.tolist():
        missed.append(score > margin.value)
        margin = margin.observe(score)
    return margin, np.array(missed)


@pytest.mark.parametrize("target", [0.01, 0.05, 0.1])
@pytest.mark.parametrize("draw", [normal, skewed, two_humps])
def test_exchangeable_scores_exceed_it_at_the_target_rate(draw: Draw, target: float) -> None:
    rng = np.random.default_rng(7)
    margin = Margin.start(draw(rng, 256), target, 0.005)
    _, missed = exceeded(margin, draw(rng, TICKS))
    deviation = math.sqrt(target * (1 - target) / TICKS)
    assert abs(missed.mean() - target) < 3 * deviation


@pytest.mark.parametrize("prior", [-1.0, 0.0, 1.0])
def test_a_wrong_start_is_unlearnt_within_two_windows(prior: float) -> None:
    rng = np.random.default_rng(3)
    margin, _ = exceeded(Margin.start([prior] * 256, 0.05, 0.005), normal(rng, 512))
    _, missed = exceeded(margin, normal(rng, TICKS))
    assert 0.04 < missed.mean() < 0.06


def test_a_growing_spread_is_followed() -> None:
    rng = np.random.default_rng(5)
    scores = rng.normal(0, np.linspace(0.02, 0.3, 2 * TICKS))
    _, missed = exceeded(Margin.start(normal(rng, 256), 0.05, 0.005), scores)
    assert 0.04 < missed.mean() < 0.065


def test_the_first_scores_are_used_at_once() -> None:
    margin = Margin.start([i / 100 for i in range(100)], 0.1, 0.005)
    assert margin.value == pytest.approx(0.90)


@given(st.lists(st.floats(-20, 20), max_size=300), st.sampled_from([0.001, 0.01, 0.3]))
def test_it_stays_finite_and_within_bounds(scores: list[float], target: float) -> None:
    margin = Margin.start([0.0] * 16, target, 0.05)
    for score in scores:
        before = (margin.alpha, margin.value, margin.scores)
        following = margin.observe(score)
        assert (margin.alpha, margin.value, margin.scores) == before
        margin = following
        assert 0 <= margin.alpha <= 5 * target
        assert len(margin.scores) == 16
        assert margin.ascending == tuple(sorted(margin.scores))
        assert -20 <= margin.value <= 20.2


def test_a_long_overload_is_forgotten_within_a_window() -> None:
    rng = np.random.default_rng(1)
    margin, _ = exceeded(Margin.start(normal(rng, 256), 0.01, 0.005), np.full(1000, 5.0))
    margin, _ = exceeded(margin, normal(rng, 300))
    assert margin.value < 0.5


def test_ticks_without_a_score_count_as_hits() -> None:
    margin = Margin.start([0.0] * 16, 0.1, 0.05).observe(1.0)
    following = margin.skip()
    assert following.alpha == pytest.approx(margin.alpha + 0.05 * 0.1)
    assert following.scores == margin.scores
