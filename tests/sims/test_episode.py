"""The loop that does not wait, on a toy world and a toy policy. No clock, no sleep."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sims.clock import STAGES, CardTime, stated_card
from sims.episode import DriveConfig, Episode
from stream.budgets.baselines import FixedController
from stream.budgets.controller import ControllerConfig, DeadlineController
from stream.budgets.decision import Rung
from stream.budgets.latency_card import LatencyCard
from stream.errors import AttachError
from stream.ticks import Tick
from tests.sims.toys import BUCKETS, GRID, ToyPolicy, ToyWorld, toy_card

FULL = FixedController(tokens=GRID.size)


def stated(
    ms: float, world: ToyWorld | None = None, policy: ToyPolicy | None = None, **config: Any
) -> Episode[int]:
    """All tokens, `ms` for a whole inference."""
    clock = CardTime(stated_card(str(ms), GRID.size), "stated")
    settings = {"budget_ms": 100} | config
    return Episode(world or ToyWorld(), policy or ToyPolicy(), FULL, clock, DriveConfig(**settings))


def controlled(
    budget_ms: float,
    world: ToyWorld | None = None,
    policy: ToyPolicy | None = None,
    card: LatencyCard | None = None,
    **allowed: Any,
) -> Episode[Any]:
    """The deadline controller, and times from the card it knows."""
    card = card or toy_card()
    policy = policy or ToyPolicy()
    config = ControllerConfig(steps=policy.steps, **({"stop_after": 40} | allowed))
    controller = DeadlineController.of(card, STAGES, "toy device", config)
    clock = CardTime(card, card.label("toy device"))
    return Episode(world or ToyWorld(), policy, controller, clock, DriveConfig(budget_ms=budget_ms))


def flat(ticks: list[Tick]) -> np.ndarray:
    return np.concatenate([t.executed for t in ticks])


def rungs(ticks: list[Tick]) -> Counter[Rung]:
    return Counter(t.decision.rung for t in ticks)


def test_the_world_goes_on_while_the_policy_computes() -> None:
    ticks = list(stated(60).run(seed=1))
    assert (ticks[0].held, ticks[0].skipped) == (5, 0)
    assert ticks[0].executed[:5].tolist() == [[0, 0, -1]] * 5
    assert ticks[1].held == 0
    assert ticks[1].skipped == 5
    assert sum(len(t.executed) for t in ticks) == 120
    starts = [t.first_step for t in ticks]
    assert starts == np.cumsum([0] + [len(t.executed) for t in ticks[:-1]]).tolist()
    assert all(t.observation.time_s == pytest.approx(t.time_s) for t in ticks if t.observation)


def test_the_world_that_waits() -> None:
    ticks = list(stated(60, mode="waiting").run(seed=1))
    assert [t.held for t in ticks] == [0] * 15
    assert {len(t.executed) for t in ticks} == {8}
    assert ticks[-1].score > 0.85
    np.testing.assert_array_equal(ticks[3].executed, ticks[3].chunk.actions)


def test_waiting_costs_less_the_longer_it_takes() -> None:
    scores = [list(stated(ms).run(seed=3))[-1].score for ms in (10, 60, 180)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] - scores[2] > 0.3


def test_the_same_seed_gives_the_same_episode() -> None:
    runs = [flat(list(controlled(60, card=toy_card(spread=0.2)).run(seed))) for seed in (4, 4, 5)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_no_time_at_all_still_moves_the_world() -> None:
    ticks = list(stated(0).run(seed=1))
    assert len(ticks) == 120
    assert not any(t.held or t.late for t in ticks)


def test_a_late_chunk_goes_on_where_the_robot_is() -> None:
    """Made two moves of the old chunk while the new one came, then stood: its first two are past"""
    episode = stated(75, budget_ms=200)
    episode.reset(1)
    first, second, third = (episode.go_on(episode.think()) for _ in range(3))
    assert (first.skipped, first.held, first.late) == (0, 6, False)
    assert (second.skipped, second.held, second.late) == (6, 0, False)
    np.testing.assert_array_equal(second.executed, first.chunk.actions[:6])
    assert (third.skipped, third.held, third.late) == (2, 4, True)
    np.testing.assert_array_equal(third.executed[:2], second.chunk.actions[6:])
    np.testing.assert_array_equal(
        episode.go_on(episode.think()).executed[:6], third.chunk.actions[2:]
    )


def test_a_policy_slower_than_its_chunks_stands_while_it_thinks() -> None:
    ticks = list(stated(125).run(seed=1))
    assert {(t.skipped, t.held, len(t.executed)) for t in ticks[:-1]} == {(0, 10, 18)}
    np.testing.assert_array_equal(ticks[0].executed[10:], ticks[0].chunk.actions)


def test_by_time_nothing_is_left_of_a_chunk_that_is_too_late() -> None:
    ticks = list(stated(75, align="time").run(seed=1))
    assert (ticks[0].skipped, ticks[0].held) == (6, 6)
    np.testing.assert_array_equal(ticks[1].executed[:2], ticks[0].chunk.actions[6:])
    never = list(stated(101, align="time").run(seed=1))
    assert sum(t.held for t in never) == 120
    assert never[-1].score < 0.1


def test_the_queue_is_the_deadline_and_the_budget_caps_it() -> None:
    ticks = list(stated(60, budget_ms=70).run(seed=1))
    assert (ticks[0].rule, ticks[0].deadline_ms) == ("cold", 70)
    assert (ticks[1].rule, ticks[1].deadline_ms) == ("budget", 70)
    assert (ticks[2].rule, ticks[2].deadline_ms) == ("queue", 37.5)
    assert [t.missed for t in ticks[:3]] == [False, False, True]
    free = list(stated(60, budget_ms=None).run(seed=1))
    assert (free[0].rule, free[0].deadline_ms) == ("cold", float("inf"))
    assert (free[1].rule, free[1].deadline_ms) == ("queue", 100)


def test_buckets_follow_the_budget() -> None:
    tokens = {b: {t.decision.tokens for t in controlled(b).run(seed=1)} for b in (30, 50, 130)}
    assert tokens[30] == {32}
    assert max(tokens[50]) == 128
    assert max(tokens[130]) == 512
    assert BUCKETS == (32, 128, 512)


def test_every_tick_says_what_was_given_up() -> None:
    ticks = list(controlled(50).run(seed=1))
    assert ticks[0].decision.rung is Rung.SMALLER_BUCKET
    assert "384 of 512 tokens" in ticks[0].decision.gave_up
    assert ticks[0].plan is not None
    assert ticks[0].plan.k == 128
    record = ticks[0].to_record()
    assert record["decision"]["rung"] == "SMALLER_BUCKET"
    assert sum(record["attention"]["by_camera"].values()) == pytest.approx(1, abs=1e-3)


def test_fewer_steps_are_decided_after_the_prefill() -> None:
    card = toy_card(act_ms=5)
    policy = ToyPolicy(steps=(2, 10))
    ticks = list(controlled(60, policy=policy, card=card, floor_tokens=32).run(seed=1))
    assert ticks[0].decision.point == "prefill"
    assert {t.decision.steps for t in ticks} == {2}
    assert rungs(ticks)[Rung.FEWER_STEPS] > 0
    assert {steps for name, steps in policy.calls if name == "act"} == {2}
    assert ticks[0].stage_ms["act"] == pytest.approx(10)


def test_dark_cameras_walk_down_the_ladder_and_up_again() -> None:
    dark = range(40, 80)
    policy = ToyPolicy()
    ticks = list(controlled(60, ToyWorld(dark=dark), policy).run(seed=1))
    blind = [t.decision.rung for t in ticks if t.first_step in dark]
    assert Rung.REUSE_PREFIX in blind
    assert blind == sorted(blind)
    assert ticks[-1].decision.rung < Rung.REUSE_PREFIX
    assert not any(t.first_step in dark for t in ticks if "encode" in t.stage_ms)
    reused = next(t for t in ticks if t.decision.rung is Rung.REUSE_PREFIX)
    assert set(reused.stage_ms) == {"act"}
    assert reused.chunk is not None
    assert reused.chunk.observed_s < reused.time_s


def test_without_prefixes_the_tail_is_played_then_held_then_the_robot_stops() -> None:
    world = ToyWorld(dark=range(40, 999))
    episode = controlled(60, world, max_prefix_age_s=0.0, stop_after=5)
    ticks = list(episode.run(seed=1))
    blind = [t.decision.rung for t in ticks if t.first_step >= 40]
    tail = blind.count(Rung.CHUNK_TAIL)
    assert tail > 0
    assert blind == [Rung.CHUNK_TAIL] * tail + [Rung.HOLD] * 5 + [Rung.STOP]
    assert episode.stopped == "5 ticks in a row without a new action in time"
    assert episode.steps < 120
    grip = ticks[-2].executed[-1]
    assert grip.tolist() == [0, 0, 1]


def test_one_camera_may_leave_and_return() -> None:
    half = range(30, 60)
    ticks = list(controlled(130, ToyWorld(half=half)).run(seed=1))
    for tick in ticks:
        lost = tick.first_step in half
        assert tick.cameras == (("top",) if lost else ("top", "back"))
        assert tick.grid is not None
        assert tick.grid.frames == len(tick.cameras)
        assert tick.plan is not None
        assert tick.plan.k <= tick.grid.size
    assert {t.first_step in half for t in ticks} == {True, False}
    assert ticks[-1].score > 0


def test_a_state_that_is_no_number_is_said_and_held() -> None:
    ticks = list(controlled(60, ToyWorld(numb=range(40, 60))).run(seed=1))
    numb = [t for t in ticks if t.first_step in range(40, 60)]
    assert {t.decision.rung for t in numb} == {Rung.CHUNK_TAIL, Rung.HOLD}
    assert all("NaN" in t.said[0] and t.chunk is None for t in numb)
    assert not any(t.said for t in ticks if t.first_step not in range(40, 60))
    assert ticks[-1].chunk is not None
    assert np.isfinite(flat(ticks)).all()


def test_a_robot_that_never_feels_again_is_stopped() -> None:
    fixed = stated(20, ToyWorld(numb=range(10, 999)), stop_after=7)
    ticks = list(fixed.run(seed=1))
    assert fixed.stopped == "7 looks in a row gave no action"
    assert not ticks[-1].success


def test_actions_that_are_no_numbers_never_reach_the_robot() -> None:
    policy = ToyPolicy(broken={2, 3})
    ticks = list(stated(20, policy=policy).run(seed=1))
    assert [bool(t.said) for t in ticks[:5]] == [False, False, True, True, False]
    assert ticks[2].chunk is None
    assert ticks[2].got in {Rung.CHUNK_TAIL, Rung.HOLD}
    assert np.isfinite(flat(ticks)).all()


def test_a_reset_in_mid_inference_leaves_nothing_behind() -> None:
    interrupted = controlled(60, card=toy_card(spread=0.1))
    interrupted.reset(7)
    interrupted.go_on(interrupted.think())
    thought = interrupted.think()
    interrupted.reset(8)
    stale = interrupted.go_on(thought)
    assert len(stale.executed) == 0
    assert (stale.epoch, interrupted.epoch, interrupted.steps) == (0, 1, 0)
    ticks = []
    while not interrupted.over:
        ticks.append(interrupted.go_on(interrupted.think()))
    fresh = list(controlled(60, card=toy_card(spread=0.1)).run(8))
    np.testing.assert_array_equal(flat(ticks)[:8], flat(fresh)[:8])
    assert ticks[0].number == 0
    assert ticks[0].chunk.actions.tolist() == fresh[0].chunk.actions.tolist()


def test_a_reset_forgets_everything_but_the_machine() -> None:
    """With a fixed controller, which learns nothing, the second episode is that of a fresh one."""
    used = stated(60)
    list(used.run(7))
    again = list(used.run(8))
    np.testing.assert_array_equal(flat(again), flat(list(stated(60).run(8))))


def test_two_interleaved_episodes_do_not_touch_each_other() -> None:
    policy = ToyPolicy()
    alone = [flat(list(controlled(50).run(seed))) for seed in (1, 2)]
    both = [controlled(50, policy=policy) for _ in (1, 2)]
    ticks: list[list[Tick]] = [[], []]
    for seed, episode in enumerate(both, start=1):
        episode.reset(seed)
    while not all(e.over for e in both):
        thoughts = [None if e.over else e.think() for e in both]
        for i in (1, 0):
            if thoughts[i] is not None:
                ticks[i].append(both[i].go_on(thoughts[i]))
    for i in (0, 1):
        np.testing.assert_array_equal(flat(ticks[i]), alone[i])


def test_a_slow_spell_costs_tokens_and_not_deadlines() -> None:
    """The clock runs on a card 1.6 times slower than the one the controller knows."""
    slow = toy_card(encode_ms=16, base_ms=12.8, token_ms=0.32, act_ms=3.2, spread=0.05)
    policy = ToyPolicy()
    controller = DeadlineController.of(toy_card(), STAGES, "x", ControllerConfig(stop_after=40))
    config = DriveConfig(budget_ms=80)
    episode = Episode(ToyWorld(), policy, controller, CardTime(slow, "slow"), config)
    ticks = [t for seed in range(4) for t in episode.run(seed)]
    assert ticks[0].decision.tokens == 128
    assert sum(t.missed for t in ticks[10:]) <= 0.03 * len(ticks)
    assert all(t.decision.source == "latency transplant of toy-vla on toy device" for t in ticks)


def test_a_filmed_episode_shows_every_period() -> None:
    episode = stated(60)
    episode.film = True
    ticks = list(episode.run(seed=1))
    assert all(len(t.seen) == len(t.executed) for t in ticks)
    assert ticks[2].seen[1] is not None
    assert ticks[2].seen[1].time_s == pytest.approx((ticks[2].first_step + 1) * 0.0125)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"cameras": ("top", "wrist")}, "looks through top, wrist; toy:follow has top, back"),
        ({"state_size": 7}, "made for 7 numbers in the state; toy:follow has 2"),
        ({"action_size": 4}, "made for 4 numbers in an action"),
        ({"dt_s": 0.1}, "made for 0.1 seconds between actions; toy:follow has 0.0125"),
    ],
)
def test_a_policy_of_another_robot_is_refused(
    change: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(ToyPolicy().spec, **change)
    monkeypatch.setattr(ToyPolicy, "spec", property(lambda self: other))
    with pytest.raises(AttachError, match=says):
        stated(60)
