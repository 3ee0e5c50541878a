"""`foveate bench controller`: controllers in synthetic worlds, against fixed choices."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..show import out, print_json, progress_bars, table

if TYPE_CHECKING:
    from stream.budgets.simulate import Bench, Row, World

MOST_MISSES, LEAST_TOKENS = 0.015, 0.9
"""What the deadline controller is held to: misses, and tokens against the best fixed choice."""
STEPS = (4, 7, 10)


def controller(
    card_file: Path | None, budget_ms: float | None, ticks: int, seed: int, as_json: bool
) -> None:
    """Print a table of worlds and controllers; every controller meets the same draws."""
    from stream.budgets.simulate import worlds

    bench, steps = bench_of(card_file, budget_ms, seed)
    rows = []
    with progress_bars({"worlds": len(worlds(1, seed))}) as progress:
        for world in worlds(ticks, seed):
            rows.append(compared(bench, world, steps))
            progress("worlds", len(rows))
    kept_in = {world[0].world: kept(world[0], world[1]) for world in rows}
    result = {
        "card": bench.card.label(bench.device),
        "budget_ms": bench.budget_ms,
        "ticks": ticks,
        "seed": seed,
        "rows": [asdict(row) for world in rows for row in world],
        "kept": kept_in,
    }
    if as_json:
        print_json(result)
        return
    cells = [cells_of(row, world[1]) for world in rows for row in world]
    title = (
        f"{ticks} ticks a world, budget {bench.budget_ms:g} ms, {result['card']}, seed {seed}; "
        f"deadline: at most {MOST_MISSES:.1%} missed and {LEAST_TOKENS:.0%} of the tokens of the "
        f"best fixed choice"
    )
    columns = ("world", "controller", "missed %", "no result in time %", "tokens", "of best fixed")
    out.print(table(title, (*columns, "turns"), cells))
    failed = [world for world, fine in kept_in.items() if not fine]
    out.print(f"kept in {len(rows) - len(failed)} of {len(rows)} worlds{_named(failed)}")


def bench_of(
    card_file: Path | None, budget_ms: float | None, seed: int
) -> tuple[Bench, tuple[int, ...]]:
    """A made-up device, or the card of a robot policy; and the flow steps it allows."""
    from sims.calibration import whole_ms
    from sims.clock import STAGES, check_card
    from stream.budgets.latency_card import LatencyCard
    from stream.budgets.latency_model import Stages
    from stream.budgets.simulate import Bench, affine_card

    if card_file is None:
        card = affine_card(device="a made-up device")
        made_up = Bench(card, Stages(), card.device, budget_ms or 65.0, chunk=4, seed=seed)
        return made_up, STEPS
    card = check_card(LatencyCard.load(card_file), card_file)
    steps = card.shapes.get("steps", (1,))
    middle = card.buckets[len(card.buckets) // 2]
    budget_ms = budget_ms or round(1.3 * whole_ms(card, middle, steps[-1]), 1)
    return Bench(card, STAGES, card.device, budget_ms, chunk=4, seed=seed), steps


def compared(bench: Bench, world: World, steps: tuple[int, ...]) -> list[Row]:
    """The deadline controller first, the best fixed choice in hindsight second."""
    from stream.budgets.baselines import FixedController, RatioController
    from stream.budgets.controller import ControllerConfig, DeadlineController
    from stream.budgets.simulate import best_fixed, simulate

    allowed = ControllerConfig(steps=steps, stop_after=None)
    deadline = DeadlineController.of(bench.card, bench.stages, bench.device, allowed)
    most, least = bench.card.buckets[-1], bench.card.buckets[0]
    fixed = {
        "all tokens": FixedController(tokens=most, steps=steps[-1]),
        "fewest tokens": FixedController(tokens=least, steps=steps[-1]),
    }
    ratio = RatioController(retain=0.25, of=most, steps=steps[-1])
    return [
        simulate(bench, world, "deadline", deadline),
        best_fixed(bench, world, steps[-1], MOST_MISSES),
        *(simulate(bench, world, name, c) for name, c in fixed.items()),
        simulate(bench, world, "25 % of the tokens", ratio),
    ]


def kept(deadline: Row, best: Row) -> bool:
    enough = deadline.mean_tokens >= LEAST_TOKENS * best.mean_tokens
    return deadline.miss_rate <= MOST_MISSES and enough


def cells_of(row: Row, best: Row) -> tuple[Any, ...]:
    return (
        row.world,
        row.controller,
        f"{100 * row.miss_rate:.2f}",
        f"{100 * row.unserved_rate:.2f}",
        f"{row.mean_tokens:.0f}",
        f"{row.mean_tokens / best.mean_tokens:.2f}",
        row.turns,
    )


def _named(worlds: list[str]) -> str:
    return f"; not in {', '.join(worlds)}" if worlds else ""
