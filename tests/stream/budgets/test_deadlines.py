"""The table of deadline rules."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.budgets.deadlines import ActionQueue, Deadlines, Rule, delay_steps
from stream.config import parse
from stream.errors import ConfigError, ValueShapeError

BOTH = Deadlines(budget_ms=60, dt_s=0.0125)
QUEUE = Deadlines(dt_s=0.0125)
COLD = Deadlines(budget_ms=60, dt_s=0.0125, cold_ms=500, guard_ms=2)


@pytest.mark.parametrize(
    ("deadlines", "queue", "limit_ms", "rule"),
    [
        (BOTH, None, 60, Rule.BUDGET),
        (QUEUE, None, 12.5, Rule.BUDGET),
        (COLD, None, 58, Rule.BUDGET),
        (BOTH, ActionQueue(0, started=False), 60, Rule.COLD),
        (QUEUE, ActionQueue(0, started=False), math.inf, Rule.COLD),
        (COLD, ActionQueue(0, started=False), 498, Rule.COLD),
        (BOTH, ActionQueue(0), 12.5, Rule.STARVED),
        (COLD, ActionQueue(0, promised_steps=3), 10.5, Rule.STARVED),
        (QUEUE, ActionQueue(8), 100, Rule.QUEUE),
        (BOTH, ActionQueue(8), 60, Rule.BUDGET),
        (BOTH, ActionQueue(4), 50, Rule.QUEUE),
        (COLD, ActionQueue(4), 48, Rule.QUEUE),
        (QUEUE, ActionQueue(8, promised_steps=3), 37.5, Rule.PROMISED),
        (QUEUE, ActionQueue(2, promised_steps=3), 25, Rule.PROMISED),
        (BOTH, ActionQueue(8, promised_steps=6), 60, Rule.BUDGET),
    ],
)
def test_rules(
    deadlines: Deadlines, queue: ActionQueue | None, limit_ms: float, rule: Rule
) -> None:
    deadline = deadlines.of(queue)
    assert (deadline.limit_ms, deadline.rule) == (pytest.approx(limit_ms), rule)
    assert deadline.slack_ms(20) == pytest.approx(limit_ms - 20)


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 20))
def test_more_actions_never_mean_less_time(few: int, more: int, promised: int) -> None:
    few, more = sorted((few, more))
    limits = [BOTH.of(ActionQueue(n, promised_steps=promised)).limit_ms for n in (0, few, more)]
    assert limits == sorted(limits)


@given(st.floats(0, 1e4), st.floats(0.001, 1))
def test_a_promise_of_the_predicted_delay_is_kept_by_the_prediction(ms: float, dt_s: float) -> None:
    steps = delay_steps(ms, dt_s)
    assert (steps - 1) * dt_s * 1000 < ms + 1e-6
    assert ms <= steps * dt_s * 1000 + 1e-6


def test_delay_steps_do_not_round_up_for_rounding_errors() -> None:
    assert delay_steps(0.1 * 3 * 1000, 0.1) == 3
    assert delay_steps(301, 0.1) == 4
    assert delay_steps(0, 0.1) == 0


@pytest.mark.parametrize(("ms", "dt_s"), [(math.nan, 0.1), (math.inf, 0.1), (-1, 0.1), (1, 0)])
def test_delays_that_make_no_sense(ms: float, dt_s: float) -> None:
    with pytest.raises(ValueShapeError):
        delay_steps(ms, dt_s)


def test_a_queue_needs_a_control_period() -> None:
    with pytest.raises(ValueShapeError, match="set dt_s"):
        Deadlines(budget_ms=60).of(ActionQueue(3))


@pytest.mark.parametrize("text", ["{}", "budget_ms: 0", "dt_s: -1", "{dt_s: 1, guard_ms: -1}"])
def test_settings_that_make_no_sense(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(text, Deadlines)


def test_queues_that_make_no_sense() -> None:
    with pytest.raises(ValueShapeError, match="negative"):
        ActionQueue(-1)
    with pytest.raises(ValueShapeError, match="negative"):
        ActionQueue(1, promised_steps=-1)
    with pytest.raises(ValueShapeError, match="never computed"):
        ActionQueue(1, started=False)
