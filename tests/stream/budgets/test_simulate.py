"""Controllers in synthetic worlds: misses, tokens, and quiet."""

from __future__ import annotations

import pytest

from stream.budgets.baselines import FixedController, RatioController
from stream.budgets.controller import ControllerConfig, DeadlineController
from stream.budgets.latency_model import ModelConfig, Stages
from stream.budgets.simulate import Bench, Row, World, best_fixed, simulate, worlds
from tests.stream.budgets.cards import card

STAGES = Stages()
CARD = card()
BENCH = Bench(CARD, STAGES, "test device", budget_ms=65, chunk=4)
WORLDS = {world.name: world for world in worlds(10_000, seed=1)}


def controlled(world: World, bench: Bench = BENCH, **latency: float) -> Row:
    controller = DeadlineController.of(
        bench.card,
        STAGES,
        bench.device,
        ControllerConfig(steps=(4, 7, 10), stop_after=None),
        ModelConfig(**latency),  # type: ignore[arg-type]
    )
    return simulate(bench, world, "deadline", controller)


@pytest.mark.parametrize("name", WORLDS)
def test_misses_are_few_and_tokens_are_many(name: str) -> None:
    row = controlled(WORLDS[name])
    fixed = best_fixed(BENCH, WORLDS[name], steps=10, miss_rate=0.015)
    assert row.miss_rate <= 0.015
    assert row.mean_tokens >= 0.9 * fixed.mean_tokens
    assert row.turns <= 0.02 * 10_000
    assert sum(row.rungs.values()) == 10_000


def test_full_tokens_are_late_and_the_smallest_bucket_is_blind() -> None:
    world = WORLDS["everything"]
    full = simulate(BENCH, world, "full", FixedController(tokens=512, steps=10))
    least = simulate(BENCH, world, "least", FixedController(tokens=32, steps=10))
    row = controlled(world)
    assert full.miss_rate > 0.5 > 0.015 > row.miss_rate
    assert row.mean_tokens > 4 * least.mean_tokens


def test_a_looser_target_misses_more_and_sees_more() -> None:
    strict, loose = (controlled(WORLDS["spikes"], target_miss=t) for t in (0.01, 0.1))
    assert strict.miss_rate < loose.miss_rate < 0.1
    assert strict.mean_tokens < loose.mean_tokens


def test_a_stuck_camera_costs_its_own_ticks_only() -> None:
    world = WORLDS["stuck"]
    row = controlled(world)
    stuck = 1 - world.has_frame.mean()
    assert row.miss_rate <= 0.001
    assert row.unserved_rate < stuck
    assert stuck - 1e-9 <= row.blind_rate < stuck + 0.001
    assert {"REUSE_PREFIX", "CHUNK_TAIL", "HOLD"} <= set(row.rungs)


def test_the_same_seed_gives_the_same_row() -> None:
    world = worlds(500, seed=4)[-1]
    assert controlled(world) == controlled(worlds(500, seed=4)[-1])
    assert controlled(world) != controlled(worlds(500, seed=5)[-1])


def test_a_ratio_is_a_fixed_bucket_when_nothing_else_changes() -> None:
    world = worlds(300, seed=2)[0]
    fixed = simulate(BENCH, world, "", FixedController(tokens=128, steps=10))
    ratio = simulate(BENCH, world, "", RatioController(retain=0.25, of=512, steps=10))
    assert fixed == ratio


def test_a_hopeless_deadline_stops_and_begins_again() -> None:
    bench = Bench(CARD, STAGES, "test device", budget_ms=14)
    allowed = ControllerConfig(stop_after=5, steps=(10,))
    controller = DeadlineController.of(CARD, STAGES, "test device", allowed)
    row = simulate(bench, worlds(60, seed=1)[0], "deadline", controller)
    assert row.unserved_rate == 1
    assert row.miss_rate == 0
    assert row.rungs == {"HOLD": 50, "STOP": 10}


def test_a_transplant_says_so() -> None:
    bench = Bench(CARD, STAGES, "laptop", budget_ms=65)
    row = controlled(worlds(50, seed=1)[0], bench)
    assert row.source == "latency transplant of toy-vla on test device"
