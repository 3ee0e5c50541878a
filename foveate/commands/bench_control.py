"""`foveate bench control`: success against kept tokens and against milliseconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..settings import DriveSettings
from ..show import err, out, print_json, progress_bars, table

if TYPE_CHECKING:
    from sims.outcomes import Outcome, Row


def control(
    files: Sequence[Path],
    play: Path | None,
    arms: str,
    tasks: str,
    budgets: str,
    episodes: int,
    settings: DriveSettings,
    workers: int,
    baseline: str | None,
    only: str | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Play what is asked for and not played yet, then sum up every line there is."""
    from sims.outcomes import read, rows_of
    from stream.errors import ConfigError

    if play is not None:
        run(play, arms, tasks, budgets, episodes, settings, workers)
    outcomes = read([*files, *([play] if play is not None else [])])
    wanted = set(only.split(",")) if only else {o.task for o in outcomes}
    outcomes = [o for o in outcomes if o.task in wanted]
    if not outcomes:
        raise ConfigError("There are no outcomes; give files of result lines, or --play FILE.")
    rows = rows_of(outcomes, baseline)
    if plot is not None:
        draw(plot, rows)
    if as_json:
        print_json({"baseline": baseline, "tasks": sorted(wanted), "rows": list(map(plain, rows))})
        return
    for mode in ("waiting", "realtime"):
        mine = [row for row in rows if row.cell.mode == mode]
        if mine:
            out.print(table_of(mode, mine, outcomes, baseline))
    if plot is not None:
        out.print(f"picture: {plot}")


def run(
    play: Path,
    arms: str,
    tasks: str,
    budgets: str,
    episodes: int,
    settings: DriveSettings,
    workers: int,
) -> None:
    """Append the outcomes that the file does not hold yet."""
    from sims.outcomes import mend, read
    from stream.errors import ConfigError

    from ..control import Arm, jobs_of, play_all

    try:
        limits = [float(b) for b in budgets.split(",") if b]
    except ValueError:
        raise ConfigError(f"The budgets {budgets!r} must be milliseconds like 40,80.") from None
    if limits and settings.time == "wall" and workers > 1:
        raise ConfigError("The wall clock is right with --workers 1 only; or use a card.")
    seeds = range(settings.seed, settings.seed + episodes)
    chosen = [Arm.of(arm) for arm in arms.split(",")]
    jobs = jobs_of(chosen, tasks.split(","), seeds, limits, settings)
    mend(play)
    done = {(o.cell, o.task, o.seed) for o in read([play])}
    left = [job for job in jobs if job.key not in done]
    err.print(f"{len(jobs) - len(left)} of {len(jobs)} episodes are played already")
    with play.open("a") as file, progress_bars({"episodes": len(left)}) as progress:
        for count, outcome in enumerate(play_all(left, workers), start=1):
            file.write(json.dumps(outcome.model_dump()) + "\n")
            file.flush()
            progress("episodes", count)


def table_of(
    mode: str, rows: Sequence[Row], outcomes: Sequence[Outcome], baseline: str | None
) -> Any:
    """One mode. Budgets and times are columns where something was computed against them."""
    timed = mode == "realtime"
    columns = ["method", "site", "keep", "success % [95 %]", "n", "score", "steps", "tokens"]
    if timed:
        columns = ["budget ms", *columns, "missed %"]
    if baseline:
        columns += ["against", "won", "lost", "p"]
    cells = []
    for row in rows:
        cell = row.cell
        line: list[Any] = [
            cell.method,
            cell.site,
            "deadline" if cell.keep is None else f"{cell.keep:g}",
            f"{100 * row.success:.1f} [{100 * row.low:.1f}, {100 * row.high:.1f}]",
            row.n,
            f"{row.score:.2f}",
            f"{row.steps:.0f}",
            f"{row.tokens:.0f}",
        ]
        if timed:
            missed = "-" if row.missed is None else f"{100 * row.missed:.1f}"
            line = [f"{cell.budget_ms:g}", *line, missed]
        if baseline:
            compared = row.p is not None
            line += [row.against, row.won, row.lost, f"{row.p:.2g}"] if compared else [""] * 4
        cells.append(line)
    tasks = sorted({o.task for o in outcomes if o.mode == mode})
    seeds = sorted({o.seed for o in outcomes if o.mode == mode})
    sources = sorted({row.cell.time_source or "" for row in rows} - {""})
    models = sorted({o.model for o in outcomes if o.mode == mode} - {""})
    parts = [mode, f"{len(tasks)} tasks", f"seeds {seeds[0]} to {seeds[-1]}", *sources, *models]
    if baseline:
        parts.append(f"won, lost and McNemar's p against {baseline} on the same episodes")
    return table(", ".join(parts), columns, cells)


def plain(row: Row) -> dict[str, Any]:
    numbers = {name: getattr(row, name) for name in type(row).__slots__ if name != "cell"}
    return {**row.cell._asdict(), **numbers}


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Success against milliseconds, and against the kept share, with Wilson bars."""
    from ..plot import figure_of

    labels = {"realtime": "budget, ms", "waiting": "visual tokens kept, %"}
    shown = [mode for mode in labels if any(row.cell.mode == mode for row in rows)]
    figure = figure_of(6.4 * len(shown), 4.2)
    for axes, mode in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        series: dict[str, list[Row]] = {}
        for row in (r for r in rows if r.cell.mode == mode):
            series.setdefault(_series(row), []).append(row)
        for name, points in sorted(series.items()):
            points = sorted(points, key=_place)
            axes.errorbar(
                [_place(p) for p in points],
                [100 * p.success for p in points],
                yerr=[
                    [100 * (p.success - p.low) for p in points],
                    [100 * (p.high - p.success) for p in points],
                ],
                marker="o",
                capsize=3,
                label=name,
            )
        if mode == "waiting":
            axes.set_xscale("log", base=2)
        axes.set(xlabel=labels[mode], ylabel="success, %", ylim=(-3, 103))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _place(row: Row) -> float:
    """Where a row stands on its axis: milliseconds, or percent of the tokens."""
    cell = row.cell
    return cell.budget_ms if cell.budget_ms is not None else 100 * (cell.keep or 1.0)


def _series(row: Row) -> str:
    """Rows of one curve have the same name."""
    cell = row.cell
    if cell.mode == "waiting":
        return f"{cell.method}, {cell.site}"
    return f"{cell.method}, {'by deadline' if cell.keep is None else f'{100 * cell.keep:g} %'}"
