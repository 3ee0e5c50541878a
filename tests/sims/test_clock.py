"""Virtual time and the queue of actions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sims.clock import CardTime, Playback, WallTime, check_card, periods, stated_card
from stream.errors import ConfigError
from tests.sims.toys import BUCKETS, toy_card
from tests.stream.budgets.cards import card as other_card


def chunk(n: int, first: float = 1.0) -> np.ndarray:
    return np.arange(first, first + n, dtype=np.float32)[:, None]


def hold(last: np.ndarray | None) -> np.ndarray:
    return np.array([-1.0 if last is None else -last[0]], np.float32)


def test_a_playback_moves_and_then_holds() -> None:
    playback = Playback.empty(1).deliver(chunk(2), 0)
    played = []
    for _ in range(4):
        playback, action = playback.next(hold)
        played.append(float(action[0]))
    assert played == [1, 2, -2, 2]
    assert (playback.moves, playback.holds, playback.steps, playback.left) == (2, 2, 4, 0)


def test_the_first_hold_knows_no_action() -> None:
    _, action = Playback.empty(1).next(hold)
    assert action.tolist() == [-1]


@given(st.integers(0, 8), st.integers(0, 12))
def test_past_actions_are_never_played(n: int, past: int) -> None:
    before = Playback.empty(1).deliver(chunk(3, first=100), 1)
    after = before.deliver(chunk(n), past)
    if past >= n:
        assert after is before
    else:
        assert after.chunk[after.position] == past + 1
        assert after.left == n - past


@pytest.mark.parametrize(
    ("ms", "steps"), [(0, 0), (0.1, 1), (12.5, 1), (12.6, 2), (60, 5), (100, 8)]
)
def test_periods_begin_until_the_result_is_there(ms: float, steps: int) -> None:
    assert periods(ms, 0.0125) == steps


def test_a_card_is_a_clock() -> None:
    clock = CardTime(toy_card(), "toy")
    times = [clock.run("prefill", tokens, 1, 0.5, lambda: 7)[1] for tokens in (32, 33, 128, 999)]
    assert times == pytest.approx([14.4, 33.6, 33.6, 110.4])
    assert clock.run("act", 32, 10, 0.5, lambda: 7) == (7, pytest.approx(20))
    unlucky = CardTime(toy_card(spread=0.2), "toy")
    by_level = [unlucky.run("act", 32, 1, level, lambda: 7)[1] for level in (0.0, 0.5, 0.99)]
    assert by_level == sorted(by_level)
    assert by_level[0] < by_level[2]


def test_the_wall_is_a_clock() -> None:
    result, ms = WallTime(torch.device("cpu")).run("act", 1, 1, 0.5, lambda: "done")
    assert result == "done"
    assert ms >= 0


def test_stated_times() -> None:
    one = stated_card("60", 512)
    assert one.buckets == (512,)
    assert [one.row(s, 512).p50_ms for s in ("encode", "prefill", "act")] == [0, 60, 0]
    three = stated_card("32=20,128=40,512=90.5", 512)
    assert three.buckets == BUCKETS
    assert CardTime(three, "").run("prefill", 100, 1, 0.0, lambda: 0) == (0, 40)
    assert "stated times" in one.label("this machine")


@pytest.mark.parametrize("text", ["", "fast", "32=", "32=20,64", "-5", "0=5", "64=nan", "inf"])
def test_wrong_stated_times(text: str) -> None:
    with pytest.raises(ConfigError, match=r"must"):
        stated_card(text, 512)


def test_a_card_of_another_kind_is_refused() -> None:
    assert check_card(toy_card(), "x") == toy_card()
    with pytest.raises(ConfigError, match=r"x\.json has the stages .* lacks act"):
        check_card(other_card(), "x.json")
