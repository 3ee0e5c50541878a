"""How results meet a person: tables, progress, or JSON on standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

WIDE = 200
"""Columns of a table that goes to a file or a pipe instead of a terminal."""

out = Console(width=None if sys.stdout.isatty() else WIDE)
err = Console(stderr=True)


def print_json(data: Any) -> None:
    """Plain JSON, one document, nothing else on standard output."""
    print(json.dumps(data, indent=2, default=str))  # noqa: T201


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A table whose numeric columns are right-aligned."""
    view = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for i, name in enumerate(columns):
        numeric = all(isinstance(r[i], int | float) or _is_figure(r[i]) for r in rows)
        view.add_column(name, justify="right" if numeric and rows else "left", overflow="fold")
    for row in rows:
        view.add_row(*[str(v) for v in row])
    return view


def _is_figure(value: Any) -> bool:
    return isinstance(value, str) and value[:1] in "0123456789-+" and bool(value)


@contextmanager
def progress_bars(totals: dict[str, int | None]) -> Iterator[Callable[[str, int], None]]:
    """Bars on standard error, one a stage, shown once the stage begins."""
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=err,
        transient=True,
    ) as bars:
        tasks = {
            stage: bars.add_task(stage, total=total, visible=False)
            for stage, total in totals.items()
        }

        def update(stage: str, done: int) -> None:
            if stage in tasks:
                bars.update(tasks[stage], completed=done, visible=True)

        yield update
