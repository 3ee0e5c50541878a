"""The controller: what fits, what does not, and what it says about it. No clock, no sleep."""

from __future__ import annotations

import ast
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import stream.budgets
from stream.budgets.baselines import FixedController, RatioController
from stream.budgets.controller import ControllerConfig, ControllerState, DeadlineController
from stream.budgets.decision import Controller, Decision, Outcome, Rung, Situation
from stream.budgets.latency_model import Point, Stages
from stream.config import parse
from stream.errors import ConfigError, ValueShapeError
from tests.stream.budgets.cards import AFFINE_MS, BUCKETS, card

STAGES = Stages()
CARD = card()
RUNS_IN_TIME = {Rung.FULL, Rung.SMALLER_BUCKET, Rung.FEWER_STEPS, Rung.BELOW_FLOOR}


def controller(**settings: Any) -> DeadlineController:
    allowed = ControllerConfig(**({"steps": (4, 10), "floor_tokens": 64} | settings))
    return DeadlineController.of(CARD, STAGES, "test device", allowed)


def ran(decision: Decision, factor: float = 1.0, late: bool | None = None) -> Outcome:
    """What a machine `factor` times slower than the card makes of a decision."""
    stages = STAGES.names if decision.prefills else STAGES.names[2:]
    times = {}
    for stage in stages:
        base, slope = AFFINE_MS[stage]
        repeats = decision.steps if stage == "flow_step" else 1
        times[stage] = (base + slope * decision.tokens) * repeats * factor
    elapsed_ms = sum(times.values())
    return Outcome(times, elapsed_ms, elapsed_ms > decision.slack_ms if late is None else late)


def settled(c: DeadlineController, slack_ms: float = 60, ticks: int = 60) -> ControllerState:
    state = c.start()
    for _ in range(ticks):
        state, decision = c.decide(state, Situation(slack_ms))
        state = c.observe(state, decision, ran(decision))
    return state


class Ticks(RuleBasedStateMachine):
    """Any order of frames, stalls, slow ticks and resets."""

    def __init__(self) -> None:
        super().__init__()
        self.controller = controller(stop_after=6, max_prefix_age_s=0.3)
        self.state = self.controller.start()
        self.decision: Decision | None = None
        self.situation = Situation(0)
        self.before = self.state

    @precondition(lambda self: self.decision is None)
    @rule(
        slack_ms=st.one_of(st.floats(-50, 120), st.just(math.inf)),
        tokens=st.one_of(st.none(), st.integers(0, 600)),
        has_frame=st.booleans() | st.just(True),
        actions_left=st.integers(0, 3),
        prefix_tokens=st.sampled_from([0, 64, 512]),
        prefix_age_s=st.floats(0, 0.6),
    )
    def decide(self, **known: Any) -> None:
        self.situation = Situation(**known)
        self.before = self.state
        self.state, self.decision = self.controller.decide(self.state, self.situation)

    @precondition(lambda self: self.decision is not None)
    @rule(factor=st.sampled_from([0.5, 1.0, 1.0, 1.0, 2.0, 5.0]), refine=st.booleans())
    def finish(self, factor: float, refine: bool) -> None:
        decision = self.decision
        assert decision is not None
        if decision.runs:
            if refine and decision.prefills:
                left = replace(self.situation, slack_ms=self.situation.slack_ms * 0.7)
                refined = self.controller.refine(self.state, decision, left)
                self.check(refined, left)
                decision = replace(refined, slack_ms=decision.slack_ms)
            self.state = self.controller.observe(self.state, decision, ran(decision, factor))
        self.decision = None

    @rule()
    def reset(self) -> None:
        learnt, epoch = self.state.latency, self.state.epoch
        self.state = self.controller.reset(self.state)
        assert (self.state.latency, self.state.epoch) == (learnt, epoch + 1)
        assert (self.state.misses, self.state.level) == (0, None)

    @invariant()
    def says_what_it_does(self) -> None:
        if self.decision is not None:
            self.check(self.decision, self.situation)

    def check(self, decision: Decision, situation: Situation) -> None:
        floor = 64 if situation.tokens is None or situation.tokens >= 64 else 32
        c = self.controller
        assert decision.why
        assert decision.source == "toy-vla on test device"
        assert decision.runs == (decision.tokens > 0) == (decision.steps > 0)
        assert decision.predicted_ms is not None
        if decision.predicted_ms > situation.slack_ms and decision.runs:
            assert decision.late
            assert decision.rung is decision.if_late
            assert "new action" in " ".join(decision.gave_up) or decision.rung is Rung.HOLD
            if decision.point == "encode":
                assert (decision.tokens, decision.steps) == (floor, c.config.steps[0])
        else:
            assert not decision.late
        if decision.rung in RUNS_IN_TIME | {Rung.REUSE_PREFIX}:
            assert decision.runs
            assert decision.predicted_ms <= situation.slack_ms
        if decision.rung is Rung.REUSE_PREFIX:
            assert decision.tokens == situation.prefix_tokens > 0
            assert situation.prefix_age_s <= 0.3
        elif decision.runs:
            assert situation.has_frame
            assert decision.tokens in BUCKETS
            assert decision.tokens <= max(32, situation.tokens or 512)
        if decision.rung is Rung.CHUNK_TAIL:
            assert situation.actions_left > 0
        if decision.rung is Rung.HOLD:
            assert situation.actions_left == 0
        assert decision.floor_broken == (
            decision.runs and decision.rung is not Rung.REUSE_PREFIX and decision.tokens < floor
        )
        assert decision.floor_broken == ("the floor of 64 tokens" in decision.gave_up)
        assert bool(decision.gave_up) == (decision.rung is not Rung.FULL)
        assert (decision.rung is Rung.STOP) == (self.before.misses >= 6)

    @invariant()
    def levels_are_buckets(self) -> None:
        level = self.state.level
        assert level is None or 0 <= level < len(BUCKETS)


TestTicks = Ticks.TestCase
TestTicks.settings = hypothesis.settings(max_examples=60, stateful_step_count=40)


situations = st.builds(
    Situation,
    slack_ms=st.floats(-20, 150),
    tokens=st.none() | st.integers(1, 600),
    has_frame=st.booleans(),
    actions_left=st.integers(0, 2),
    prefix_tokens=st.sampled_from([0, 128]),
)


@given(situations, st.floats(-20, 150), st.lists(st.floats(5, 120), max_size=12))
def test_more_slack_never_gives_less(
    situation: Situation, slack_ms: float, history: list[float]
) -> None:
    c = controller(rise_after=2, stop_after=None)
    state = c.start()
    for past in history:
        state, decision = c.decide(state, Situation(past))
        state = c.observe(state, decision, ran(decision))
    less, more = sorted((situation.slack_ms, slack_ms))
    _, poorer = c.decide(state, replace(situation, slack_ms=less))
    _, richer = c.decide(state, replace(situation, slack_ms=more))
    assert richer.rung <= poorer.rung
    if poorer.rung in RUNS_IN_TIME:
        assert (richer.tokens, richer.steps) >= (poorer.tokens, poorer.steps)


@pytest.fixture(scope="module")
def at_work() -> tuple[DeadlineController, ControllerState]:
    c = controller()
    return c, settled(c, ticks=5)


@given(situation=situations)
def test_decisions_are_pure_and_travel(
    at_work: tuple[DeadlineController, ControllerState], situation: Situation
) -> None:
    c, state = at_work
    kept = pickle.loads(pickle.dumps(at_work))
    first, again = c.decide(state, situation), c.decide(state, situation)
    assert first == again == kept[0].decide(kept[1], situation)
    assert kept == (c, state)


def test_the_first_tick_takes_what_fits_at_once() -> None:
    _, decision = controller().decide(controller().start(), Situation(math.inf))
    assert (decision.rung, decision.tokens, decision.steps) == (Rung.FULL, 512, 10)
    assert decision.gave_up == ()


def test_a_doubling_drops_the_bucket_at_the_next_tick() -> None:
    c = controller()
    state = settled(c)
    state, before = c.decide(state, Situation(60))
    assert before.tokens == 256
    state = c.observe(state, before, ran(before, 2.0))
    _, following = c.decide(state, Situation(60))
    assert following.tokens < before.tokens
    assert not ran(following, 2.0).late


def test_it_rises_one_bucket_at_a_time_after_enough_ticks_with_room() -> None:
    c = controller(rise_after=3)
    state, tokens = settled(c, 38), []
    for _ in range(10):
        state, decision = c.decide(state, Situation(math.inf))
        tokens.append(decision.tokens)
        state = c.observe(state, decision, ran(decision))
    assert tokens == [128, 128, 256, 256, 256, 512, 512, 512, 512, 512]


def test_room_must_last() -> None:
    """Ticks with room that do not follow each other, or that have just enough, do not add up."""
    c = controller(rise_after=3)
    state = settled(c, 38)
    needed_ms = c.model.predict_ms(state.latency, 3, 10, Point.ENCODE)
    for slack_ms in [math.inf, math.inf, 38] * 3 + [needed_ms * 1.04] * 9:
        state, decision = c.decide(state, Situation(slack_ms))
        assert decision.tokens == 128


LADDER = [
    (Situation(200), Rung.FULL, 512, 10, ()),
    (Situation(40), Rung.SMALLER_BUCKET, 128, 10, ("384 of 512 tokens",)),
    (Situation(25), Rung.FEWER_STEPS, 64, 4, ("448 of 512 tokens", "6 of 10 steps")),
    (
        Situation(17.5),
        Rung.BELOW_FLOOR,
        32,
        4,
        ("480 of 512 tokens", "6 of 10 steps", "the floor of 64 tokens"),
    ),
    (
        Situation(12, prefix_tokens=128, prefix_age_s=0.4),
        Rung.REUSE_PREFIX,
        128,
        4,
        ("6 of 10 steps", "a new look"),
    ),
    (
        Situation(12, prefix_tokens=128, prefix_age_s=0.6, actions_left=1),
        Rung.CHUNK_TAIL,
        64,
        4,
        ("448 of 512 tokens", "6 of 10 steps", "a new action in time"),
    ),
    (
        Situation(12),
        Rung.HOLD,
        64,
        4,
        ("448 of 512 tokens", "6 of 10 steps", "motion until the next action"),
    ),
    (Situation(-1, actions_left=1), Rung.CHUNK_TAIL, 0, 0, ("a new action in time",)),
    (Situation(-1), Rung.HOLD, 0, 0, ("motion until the next action",)),
    (
        Situation(200, has_frame=False, prefix_tokens=512, actions_left=1),
        Rung.REUSE_PREFIX,
        512,
        10,
        ("a new look",),
    ),
    (
        Situation(200, has_frame=False, actions_left=1),
        Rung.CHUNK_TAIL,
        0,
        0,
        ("a new action in time",),
    ),
    (Situation(200, has_frame=False), Rung.HOLD, 0, 0, ("motion until the next action",)),
    (Situation(200, tokens=300), Rung.FULL, 256, 10, ()),
    (Situation(200, tokens=0), Rung.FULL, 32, 10, ()),
]


@pytest.mark.parametrize(("situation", "rung", "tokens", "steps", "gave_up"), LADDER)
def test_every_rung_has_its_precondition(
    situation: Situation, rung: Rung, tokens: int, steps: int, gave_up: tuple[str, ...]
) -> None:
    c = controller()
    state = replace(c.start(), level=4)
    _, decision = c.decide(state, situation)
    assert (decision.rung, decision.tokens, decision.steps) == (rung, tokens, steps)
    assert decision.gave_up == gave_up
    assert decision.floor_broken == (rung is Rung.BELOW_FLOOR)
    assert decision.late == (tokens > 0 and rung in (Rung.CHUNK_TAIL, Rung.HOLD))


def test_it_stops_after_misses_in_a_row_and_only_a_reset_goes_on() -> None:
    c = controller(stop_after=3)
    state = c.start()
    for misses in range(3):
        assert state.misses == misses
        state, decision = c.decide(state, Situation(200))
        state = c.observe(state, decision, ran(decision, late=True))
    for _ in range(2):
        state, decision = c.decide(state, Situation(200))
        assert decision.rung is decision.if_late is Rung.STOP
        assert not decision.runs
        assert decision.why == "3 ticks in a row without a new action in time"
    _, decision = c.decide(c.reset(state), Situation(200))
    assert decision.rung in RUNS_IN_TIME


def test_what_counts_as_a_miss() -> None:
    c = controller(stop_after=3)
    state, _ = c.decide(c.start(), Situation(-1))
    assert state.misses == 1
    state, _ = c.decide(state, Situation(-1, actions_left=1))
    assert state.misses == 1
    state, decision = c.decide(state, Situation(200))
    assert c.observe(state, decision, ran(decision, late=True)).misses == 2
    assert c.observe(state, decision, ran(decision)).misses == 0
    never = controller(stop_after=None)
    state = replace(never.start(), misses=1000)
    assert never.decide(state, Situation(200))[1].rung is Rung.FULL


def test_an_answer_to_the_episode_before_teaches_latency_alone() -> None:
    c = controller()
    state, decision = c.decide(c.start(), Situation(60))
    state = c.reset(state)
    following = c.observe(state, decision, ran(decision, 2.0))
    assert following.misses == 0
    assert following.latency != state.latency


def test_a_slow_spell_that_nothing_fits_is_left_by_itself() -> None:
    """Runs behind a hold see the machine recover; a reused prefix lets its stages relax."""
    for prefix_tokens in (0, 128):
        c = controller(stop_after=None)
        state = settled(c)
        for factor in [12.0] * 20 + [1.0] * 90:
            situation = Situation(60, prefix_tokens=prefix_tokens)
            state, decision = c.decide(state, situation)
            if decision.runs:
                state = c.observe(state, decision, ran(decision, factor))
        assert (decision.rung, decision.tokens) == (Rung.SMALLER_BUCKET, 256)


@pytest.mark.parametrize(
    ("slack_ms", "rung", "steps", "late"),
    [
        (30, Rung.SMALLER_BUCKET, 10, False),
        (12, Rung.FEWER_STEPS, 4, False),
        (2, Rung.CHUNK_TAIL, 4, True),
        (-5, Rung.CHUNK_TAIL, 4, True),
    ],
)
def test_steps_are_decided_again_after_the_prefill(
    slack_ms: float, rung: Rung, steps: int, late: bool
) -> None:
    c = controller()
    situation = Situation(40, actions_left=2)
    state, decision = c.decide(replace(c.start(), level=4), situation)
    refined = c.refine(state, decision, replace(situation, slack_ms=slack_ms))
    assert (refined.rung, refined.steps, refined.late) == (rung, steps, late)
    assert (refined.tokens, refined.point, refined.slack_ms) == (128, "prefill", slack_ms)


def test_a_quick_prefill_gives_steps_back() -> None:
    c = controller()
    state, decision = c.decide(c.start(), Situation(25))
    assert (decision.tokens, decision.steps) == (64, 4)
    refined = c.refine(state, decision, Situation(22))
    assert (refined.rung, refined.steps) == (Rung.SMALLER_BUCKET, 10)
    state, decision = c.decide(c.start(), Situation(12))
    assert decision.late
    refined = c.refine(state, decision, Situation(9))
    assert (refined.rung, refined.late) == (Rung.FEWER_STEPS, False)


def test_what_does_not_prefill_is_not_refined() -> None:
    c = controller()
    for situation in (Situation(-1), Situation(12, prefix_tokens=128)):
        state, decision = c.decide(c.start(), situation)
        assert c.refine(state, decision, situation) is decision


def test_a_lost_camera_lowers_the_top_and_its_return_is_slow() -> None:
    c = controller(rise_after=2)
    state, tokens = settled(c, math.inf), []
    for available in [512, 256, 256, 512, 512, 512]:
        state, decision = c.decide(state, Situation(math.inf, tokens=available))
        tokens.append(decision.tokens)
        state = c.observe(state, decision, ran(decision))
    assert tokens == [512, 256, 256, 256, 512, 512]


def test_a_floor_above_the_card_is_refused() -> None:
    with pytest.raises(ConfigError, match="floor of 600 tokens is above the largest bucket"):
        controller(floor_tokens=600)


@pytest.mark.parametrize(
    "text", ["steps: []", "steps: [4, 4]", "steps: [0]", "stop_after: 0", "rise_room: -1"]
)
def test_settings_that_make_no_sense(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(text, ControllerConfig)


@pytest.mark.parametrize(
    "known",
    [{"slack_ms": math.nan}, {"slack_ms": 1, "actions_left": -1}, {"slack_ms": 1, "tokens": -1}],
)
def test_situations_that_make_no_sense(known: dict[str, Any]) -> None:
    with pytest.raises(ValueShapeError):
        Situation(**known)


@pytest.mark.parametrize("ms", [math.nan, math.inf, -1.0])
def test_times_that_make_no_sense(ms: float) -> None:
    with pytest.raises(ValueShapeError, match="prefill took"):
        Outcome({"prefill": ms}, 1.0, False)
    with pytest.raises(ValueShapeError, match="elapsed took"):
        Outcome({}, ms, False)


def test_baselines_take_what_they_were_told() -> None:
    fixed: Controller[int] = FixedController(tokens=128, steps=10)
    ratio: Controller[int] = RatioController(retain=0.25, of=512)
    for c, expected in ((fixed, [128, 100, 128]), (ratio, [128, 25, 128])):
        state, tokens = c.start(), []
        for available in (None, 100, 512):
            situation = Situation(-50, tokens=available)
            state, decision = c.decide(state, situation)
            assert c.refine(state, decision, situation) is decision
            state = c.observe(state, decision, ran(decision))
            tokens.append(decision.tokens)
            assert decision.predicted_ms is None
        assert tokens == expected
        blind = c.decide(state, Situation(9, has_frame=False, actions_left=1))[1]
        assert (blind.rung, blind.runs) == (Rung.CHUNK_TAIL, False)
        assert c.reset(state) != state


def test_nothing_here_reads_a_clock() -> None:
    for path in Path(stream.budgets.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{a.name}" for a in node.names]
            for name in names:
                banned = ("time", "asyncio", "threading", "torch", "datetime.datetime")
                assert not name.startswith(banned), (path.name, name)
            assert ast.unparse(node) not in ("date.today", "random.random", "np.random.rand")


def test_a_result_that_is_late_but_of_use_gets_more_than_the_floor() -> None:
    c = controller()
    _, useless = c.decide(c.start(), Situation(slack_ms=-5))
    assert (useless.rung, useless.runs) == (Rung.HOLD, False)
    state, late = c.decide(c.start(), Situation(slack_ms=-5, useful_ms=60, actions_left=1))
    _, timely = c.decide(c.start(), Situation(slack_ms=60))
    assert (late.rung, late.late) == (Rung.CHUNK_TAIL, True)
    assert (late.tokens, late.steps) == (timely.tokens, timely.steps) != (64, 4)
    kept = c.refine(state, late, Situation(slack_ms=-20, useful_ms=45))
    assert (kept.steps, kept.late) == (late.steps, True)
