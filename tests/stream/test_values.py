"""The frozen values, signals and memory: what they refuse and what they promise."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stream.data import Budget, Frame, PatchGrid, Segment, VisualTokens
from stream.errors import BudgetError, SignalError, ValueShapeError
from stream.memory import Memory
from stream.plan import Plan
from stream.signals import Signal, Signals

GRID = PatchGrid(2, 2, 3)


def picture(*shape: int, dtype: Any = np.uint8) -> Any:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Frame(picture(4, 5), 0.0, 0), r"uint8 \(4, 5\); it must be uint8"),
        (lambda: Frame(picture(4, 5, 4), 0.0, 0), r"\(4, 5, 4\); .* Convert to RGB first"),
        (lambda: Frame(picture(4, 5, 3, dtype=np.float32), 0.0, 0), "Frame.image is float32"),
        (lambda: PatchGrid(0, 2, 2), "has an empty axis; every axis must be at least 1"),
        (lambda: Segment(3, 3), "is empty or negative"),
        (lambda: Segment(-1, 3), "is empty or negative"),
        (
            lambda: VisualTokens(torch.ones(3), torch.arange(3), GRID, (0.0, 1.0)),
            r"x is \(3,\) and index \(3,\); they must be \[n, d\] and \[n\]",
        ),
        (
            lambda: VisualTokens(torch.ones(3, 4), torch.arange(2), GRID, (0.0, 1.0)),
            r"x is \(3, 4\) and index \(2,\)",
        ),
        (
            lambda: VisualTokens(torch.ones(3, 4), torch.arange(3), GRID, (0.0,)),
            "1 presentation times for 2 frames",
        ),
        (
            lambda: VisualTokens.full(torch.ones(11, 4), GRID, (0.0, 1.0)),
            "11 tokens for PatchGrid.* with 12 patches",
        ),
    ],
)
def test_contradictions_are_refused_at_birth(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueShapeError, match=message):
        make()


def test_values_are_frozen_and_print_shapes() -> None:
    tokens = VisualTokens.full(torch.ones(12, 4), GRID, (0.0, 0.5))
    frame = Frame(picture(4, 5, 3), 1.25, 7)
    assert repr(frame) == "Frame(5x4, pts_s=1.250, index=7)"
    assert repr(tokens).startswith("VisualTokens(x=(12, 4), torch.float32, PatchGrid(frames=2")
    for value in (tokens, frame, GRID, Budget(3), Segment(0, 2), Plan.identity(2)):
        name = dataclasses.fields(value)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, None)
        assert type(pickle.loads(pickle.dumps(value))) is type(value)


def test_tokens_know_their_frames() -> None:
    whole = VisualTokens.full(torch.ones(12, 4), GRID, (0.0, 0.5))
    part = VisualTokens(torch.ones(3, 4), torch.tensor([5, 6, 11]), GRID, (0.0, 0.5))
    assert (GRID.per_frame, GRID.size, len(Segment(2, 5))) == (6, 12, 3)
    assert whole.is_full
    assert not part.is_full
    assert whole.frame.tolist() == [0] * 6 + [1] * 6
    assert part.frame.tolist() == [0, 1, 1]


@given(st.floats(0.0001, 1), st.integers(1, 5000))
def test_a_ratio_is_rounded_once_and_leaves_at_least_one(retain: float, of: int) -> None:
    tokens = Budget.ratio(retain, of).tokens
    assert tokens == max(1, round(retain * of))
    assert 1 <= tokens <= of


@pytest.mark.parametrize("retain", [0.0, -0.1, 1.0001, float("nan"), float("inf")])
def test_wrong_ratios_are_refused(retain: float) -> None:
    with pytest.raises(BudgetError, match=r"it must be in \(0, 1\]"):
        Budget.ratio(retain, 10)


def test_negative_budgets_are_refused() -> None:
    with pytest.raises(BudgetError, match=r"Budget\.tokens is -1; it must be 0 or more"):
        Budget(-1)
    assert Budget(0).tokens == 0


# ---------------------------------------------------------------- signals


def test_signals_are_made_when_first_read_and_once() -> None:
    calls = []

    def make() -> torch.Tensor:
        calls.append(1)
        return torch.arange(3, dtype=torch.bfloat16)

    signals = Signals({Signal.SALIENCY: make, Signal.LAST_ROW: torch.ones(3)})
    assert calls == []
    assert signals.read == set()
    assert signals[Signal.SALIENCY].tolist() == [0, 1, 2]
    assert signals[Signal.SALIENCY].dtype == torch.float32
    assert calls == [1]
    assert signals.read == {Signal.SALIENCY}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_broken_signals_are_named(bad: float) -> None:
    signals = Signals({Signal.SALIENCY: torch.tensor([0.0, bad])})
    with pytest.raises(SignalError, match="Signal 'saliency' holds NaN or infinite values"):
        signals[Signal.SALIENCY]


def test_only_declared_and_given_signals_can_be_read() -> None:
    given_here = Signals({Signal.SALIENCY: torch.ones(2)})
    declared = given_here.declared_by(frozenset({Signal.LAST_ROW}))
    with pytest.raises(SignalError, match="reads 'saliency' but declares only last_row; add it"):
        declared[Signal.SALIENCY]
    with pytest.raises(SignalError, match=r"'last_row' is not given here; given: saliency\."):
        declared[Signal.LAST_ROW]
    more = declared.extended({Signal.LAST_ROW: torch.zeros(2)})
    assert more[Signal.LAST_ROW].tolist() == [0, 0]
    with pytest.raises(SignalError, match="declares only"):
        more[Signal.SALIENCY]
    with pytest.raises(SignalError, match="given: none"):
        Signals({})[Signal.SALIENCY]


# ---------------------------------------------------------------- memory


def test_memory_draws_by_seed_and_tick_alone() -> None:
    def draw(seed: int, tick: int) -> float:
        return float(torch.rand(1, generator=Memory(seed, tick).generator()))

    assert draw(1, 2) == draw(1, 2)
    assert len({draw(seed, tick) for seed in range(5) for tick in range(5)}) == 25


def test_a_reset_memory_forgets_all_but_its_seed() -> None:
    memory = Memory(seed=5, tick=3, state={"rows": 1})
    memory.reset()
    assert memory == Memory(seed=5)
