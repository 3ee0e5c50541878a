"""`foveate replay`: a recorded episode under other budgets, and where the actions change."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..robot import controller_of, load_policy, timing_of
from ..settings import DriveSettings
from ..show import out, print_json, progress_bars, table

if TYPE_CHECKING:
    from sims.replay import Change
    from stream.sinks.jsonl import Recording

MOST = 12
"""Ticks of a table of the greatest changes."""


def replay(
    folder: Path,
    budgets: str,
    keeps: str,
    overrides: Sequence[str],
    plot: Path | None,
    as_json: bool,
) -> None:
    """Every episode of a recording at every budget and share, against what was recorded."""
    from sims.calibration import whole_ms
    from sims.replay import replay as replayed
    from stream.config import parse
    from stream.errors import ConfigError
    from stream.sinks.jsonl import read

    recordings = read(folder)
    try:
        choices = [("budget_ms", float(b)) for b in budgets.split(",") if b]
        choices += [("keep", float(k)) for k in keeps.split(",") if k]
    except ValueError:
        raise ConfigError(f"--budgets {budgets!r} and --keeps {keeps!r} must be numbers.") from None
    base = recordings[0].about["settings"] | {"budget_ms": None, "keep": None, "mode": "waiting"}
    first = parse(json.dumps(base), DriveSettings, overrides, origin=str(folder))
    policy = load_policy(first)
    timing = timing_of(first, policy, _first_sight(recordings))
    clock = _card_clock(timing.card, timing.clock.label)
    results: list[dict[str, Any]] = []
    total = sum(len(r.ticks) for r in recordings) * max(1, len(choices))
    with progress_bars({"ticks": total}) as progress:
        done = 0
        for key, value in choices or [("keep", 1.0)]:
            settings = parse(first.model_dump_json(), DriveSettings, [f"{key}={value}"])
            changes: list[Change] = []
            for recording in recordings:
                controller = controller_of(settings, timing.card, policy)
                for change in replayed(recording, policy, controller, clock, settings.budget_ms):
                    changes.append(change)
                    progress("ticks", done := done + 1)
            name = f"{value:g} ms" if key == "budget_ms" else f"{100 * value:g} % kept"
            results.append({"choice": name, **summary(changes), "ticks": changes})
    if plot is not None:
        draw(plot, results)
    if as_json:
        plain = [{**r, "ticks": [asdict(c) for c in r["ticks"]]} for r in results]
        print_json({"recording": str(folder), "times": clock.label, "choices": plain})
        return
    columns = ("choice", "ticks", "tokens", "median ms", "action L2", "largest", "overlap")
    rows = [[_figure(len(r[c]) if c == "ticks" else r[c]) for c in columns] for r in results]
    whole = f"full tokens take {whole_ms(timing.card, timing.card.buckets[-1]):.0f} ms"
    title = f"{folder} again, against what was recorded; {clock.label}, {whole}"
    out.print(table(title, columns, rows))
    for result in results:
        out.print(_greatest(result))
    if plot is not None:
        out.print(f"picture: {plot}")


def summary(changes: Sequence[Change]) -> dict[str, Any]:
    """Means over the ticks that both computed."""
    distances = [c.action_l2 for c in changes if c.action_l2 is not None]
    overlaps = [c.overlap for c in changes if c.overlap is not None]
    ran = [c for c in changes if c.tokens_now]
    return {
        "compared": len(distances),
        "tokens": sum(c.tokens_now for c in ran) / max(1, len(ran)),
        "median ms": sorted(c.took_ms for c in changes)[len(changes) // 2] if changes else None,
        "action L2": sum(distances) / len(distances) if distances else None,
        "largest": max(distances, default=None),
        "overlap": sum(overlaps) / len(overlaps) if overlaps else None,
    }


def _first_sight(recordings: Sequence[Recording]) -> Any:
    """The first observation of all; what a policy is warmed with."""
    from stream.errors import SourceError

    for recording in recordings:
        for tick in recording.ticks:
            observation = recording.observation(tick)
            if observation is not None:
                return observation
    raise SourceError("The recording holds no observation that could be replayed.")


def _card_clock(card: Any, label: str) -> Any:
    """Times drawn from the card, so that a replay gives the same twice."""
    from sims.clock import CardTime

    return CardTime(card, f"times of the card, {label}")


def _greatest(result: dict[str, Any]) -> Any:
    """The ticks whose actions changed most, in the order of the episode."""
    compared = [c for c in result["ticks"] if c.action_l2 is not None]
    most = sorted(compared, key=lambda c: -c.action_l2)[:MOST]
    rows = [
        (
            c.tick,
            f"{c.time_s:.2f}",
            f"{c.tokens_then} -> {c.tokens_now}",
            f"{c.action_l2:.3f}",
            _figure(c.overlap),
            c.rung_now.lower(),
        )
        for c in sorted(most, key=lambda c: c.tick)
    ]
    columns = ("tick", "time s", "tokens", "action L2", "overlap", "decided")
    return table(f"{result['choice']}: where the actions change most", columns, rows)


def _figure(value: Any) -> Any:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else value


def draw(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """Action change and overlap over time, a line for each choice."""
    from ..plot import figure_of

    figure = figure_of(8.0, 5.0)
    changed, shared = figure.subplots(2, 1, sharex=True)
    for result in results:
        ticks = [c for c in result["ticks"] if c.action_l2 is not None]
        changed.plot(
            [c.time_s for c in ticks], [c.action_l2 for c in ticks], label=result["choice"]
        )
        both = [c for c in result["ticks"] if c.overlap is not None]
        shared.plot([c.time_s for c in both], [c.overlap for c in both])
    changed.set(ylabel="action L2")
    changed.legend(fontsize=8)
    shared.set(xlabel="time, s", ylabel="kept-token overlap", ylim=(-0.03, 1.03))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
