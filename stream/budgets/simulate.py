"""A controller against a synthetic machine, tick by tick, with no clock: everything is drawn first.

Every controller meets the same draws, so rows of a table differ by the controller alone. Times
come from a card; a world multiplies them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .baselines import FixedController
from .decision import Controller, Outcome, Rung, Situation
from .latency_card import LEVELS, LatencyCard, StageTiming
from .latency_model import Stages

Floats = NDArray[np.float64]

BUCKETS = (32, 64, 128, 256, 512)
AFFINE_MS = {
    "encode": (12.0, 0.0),
    "reduce": (0.4, 0.0),
    "prefill": (6.0, 0.06),
    "flow_step": (1.5, 0.002),
    "action_head": (0.5, 0.0),
}
"""A made-up device: milliseconds at no tokens, and for each token."""


def affine_card(
    spread: float = 0.05, count: int = 400, device: str = "test device", seed: int = 0
) -> LatencyCard:
    """The card of a device that nobody owns; spread: standard deviation of the log of a sample."""
    rng = np.random.default_rng(seed)
    rows = [
        StageTiming.of(
            stage,
            bucket,
            ((base + slope * bucket) * np.exp(spread * rng.normal(size=count))).tolist(),
        )
        for stage, (base, slope) in AFFINE_MS.items()
        for bucket in BUCKETS
    ]
    return LatencyCard(
        model="toy-vla",
        device=device,
        threads=2,
        dtype="float32",
        date="2026-11-22",
        shapes={"visual_tokens": (512,), "image": (128, 128, 3)},
        warmup=20,
        seed=seed,
        timings=tuple(rows),
    )


@dataclass(frozen=True, slots=True)
class World:
    """What befalls a machine.

    factor: [ticks] on all times of the card. A tick's own noise comes on top.
    has_frame: [ticks] whether the camera delivered.
    """

    name: str
    factor: Floats
    has_frame: NDArray[np.bool_]

    @property
    def ticks(self) -> int:
        return len(self.factor)


def worlds(ticks: int, seed: int) -> tuple[World, ...]:
    """The worlds a controller is judged in.

    stationary: nothing happens. drift: two slow waves of +-40 %. spikes: 3 % of ticks take twice
    as long. bursts: 20 ticks of 1.8 times as long, every 500 on average. doubling: twice as slow
    from the middle on. stuck: the camera sticks for 10 ticks, every 500 on average. everything:
    drift, spikes at 0.3 %, bursts and a stuck camera.
    """
    rng = np.random.default_rng(seed)
    tick = np.arange(ticks)
    one, seen = np.ones(ticks), np.ones(ticks, dtype=np.bool_)
    drift = 1.4 ** np.sin(tick * 4 * np.pi / ticks)
    bursts = np.where(_spells(rng, ticks, every=500, length=20), 1.8, 1.0)
    neighbour = np.where(tick // 150 % 2 == 1, rng.uniform(1, 2.5, ticks), 1.0)
    stuck = ~_spells(rng, ticks, every=500, length=10)
    rare = np.where(rng.random(ticks) < 0.003, 2.0, 1.0)
    return (
        World("stationary", one, seen),
        World("drift", drift, seen),
        World("spikes", np.where(rng.random(ticks) < 0.03, 2.0, 1.0), seen),
        World("bursts", bursts, seen),
        World("neighbour", neighbour, seen),
        World("doubling", np.where(tick < ticks // 2, 1.0, 2.0), seen),
        World("stuck", one, stuck),
        World("everything", drift * bursts * rare, stuck),
    )


@dataclass(frozen=True, slots=True)
class Bench:
    """Everything but the controller and the world.

    stages: what follows a decision; `encode` is the stage before it.
    budget_ms: from the observation to the result.
    tick_s: time between observations. chunk: actions in a result, of which a tick executes one.
    """

    card: LatencyCard
    stages: Stages
    device: str
    budget_ms: float
    encode: str = "encode"
    tick_s: float = 0.1
    chunk: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a comparison.

    source: whose times these are; says so when it is a latency transplant.
    miss_rate: share of ticks whose result was promised in time and came late.
    unserved_rate: share of ticks without a new result in time for any reason: missed, announced
        as late, chunk tail, hold. Nobody serves a stuck camera.
    blind_rate: unserved ticks and those that used an old prefix.
    mean_tokens: over the ticks that computed a prefix.
    turns: times the tokens changed direction, up then down or down then up.
    rungs: ticks that ended on each rung.
    """

    world: str
    controller: str
    source: str
    miss_rate: float
    unserved_rate: float
    blind_rate: float
    mean_tokens: float
    turns: int
    rungs: Mapping[str, int]


def simulate[S](bench: Bench, world: World, name: str, controller: Controller[S]) -> Row:
    """Run `controller` through `world`. A STOP ends the episode; the next tick begins another."""
    times_ms = _times(bench, world)
    buckets = bench.card.buckets
    state = controller.start()
    tokens: list[int] = []
    rungs: Counter[str] = Counter()
    missed = unserved = blind = actions_left = prefix_tokens = prefix_tick = 0
    for tick in range(world.ticks):
        situation = Situation(
            slack_ms=bench.budget_ms - times_ms[bench.encode][0][tick],
            has_frame=bool(world.has_frame[tick]),
            actions_left=actions_left,
            prefix_tokens=prefix_tokens,
            prefix_age_s=(tick - prefix_tick) * bench.tick_s,
        )
        state, decision = controller.decide(state, situation)
        promised = decision.runs and not decision.late
        late = True
        if decision.runs:
            bucket = min(bisect_left(buckets, decision.tokens), len(buckets) - 1)
            stage_ms = {}
            if decision.prefills:
                stage_ms = {s: times_ms[s][bucket][tick] for s in bench.stages.prefix}
                tokens.append(decision.tokens)
                prefix_tokens, prefix_tick = decision.tokens, tick
                left_ms = situation.slack_ms - sum(stage_ms.values())
                decision = controller.refine(state, decision, replace(situation, slack_ms=left_ms))
            if bench.stages.step:
                step_ms = times_ms[bench.stages.step][bucket][tick]
                stage_ms[bench.stages.step] = step_ms * decision.steps
            stage_ms |= {s: times_ms[s][bucket][tick] for s in bench.stages.tail}
            elapsed_ms = sum(stage_ms.values())
            late = elapsed_ms > situation.slack_ms
            state = controller.observe(state, decision, Outcome(stage_ms, elapsed_ms, late))
        missed += promised and late
        unserved += late
        blind += late or not decision.prefills
        rungs[decision.rung.name] += 1
        fresh = bench.chunk - 1 - late if decision.runs else 0
        actions_left = max(fresh, actions_left - 1, 0)
        if decision.rung is Rung.STOP:
            state = controller.reset(state)
            actions_left = prefix_tokens = 0
    return Row(
        world=world.name,
        controller=name,
        source=bench.card.label(bench.device),
        miss_rate=missed / world.ticks,
        unserved_rate=unserved / world.ticks,
        blind_rate=blind / world.ticks,
        mean_tokens=sum(tokens) / max(1, len(tokens)),
        turns=_turns(tokens),
        rungs=dict(rungs),
    )


def best_fixed(bench: Bench, world: World, steps: int, miss_rate: float) -> Row:
    """In hindsight: the largest bucket that, kept throughout, misses no more than `miss_rate`.

    The smallest bucket when all miss more.
    """
    for bucket in reversed(bench.card.buckets):
        fixed = FixedController(tokens=bucket, steps=steps)
        row = simulate(bench, world, f"fixed {bucket}", fixed)
        if row.miss_rate <= miss_rate:
            break
    return row


def _times(bench: Bench, world: World) -> dict[str, list[list[float]]]:
    """[stage][bucket][tick] milliseconds; one draw serves all buckets of a stage."""
    rng = np.random.default_rng(bench.seed)
    times = {}
    for stage in (bench.encode, *bench.stages.names):
        level = rng.random(world.ticks)
        rows = [bench.card.row(stage, bucket) for bucket in bench.card.buckets]
        times[stage] = [
            (np.interp(level, LEVELS, row.quantiles_ms) * world.factor).tolist() for row in rows
        ]
    return times


def _spells(rng: np.random.Generator, ticks: int, every: int, length: int) -> NDArray[np.bool_]:
    """Spells of `length` ticks that begin at random, one in `every` ticks on average."""
    begins = rng.random(ticks) < 1 / every
    return np.convolve(begins, np.ones(length))[:ticks] > 0


def _turns(tokens: list[int]) -> int:
    change = np.diff(np.asarray(tokens))
    direction = np.sign(change[change != 0])
    return int((direction[1:] != direction[:-1]).sum())
