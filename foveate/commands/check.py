"""`foveate check golden | inputs | reducer`."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..show import out, print_json, table

if TYPE_CHECKING:
    from stream.golden import Verdict


def golden(folder: Path, as_json: bool) -> None:
    """Cases passed, failed and skipped for each file; exit 1 on any failure."""
    from stream.golden import check_folder

    results = check_folder(folder)
    counts = {name: Counter(c.verdict for c in cases) for name, cases in results.items()}
    failures = [
        (name, case)
        for name, cases in results.items()
        for case in cases
        if case.verdict == "failed"
    ]
    if as_json:
        print_json(
            {
                name: {**counts[name], "cases": [asdict(c) for c in cases]}
                for name, cases in results.items()
            }
        )
    else:
        verdicts: tuple[Verdict, ...] = ("passed", "failed", "skipped")
        rows = [(name, *(n[v] for v in verdicts)) for name, n in counts.items()]
        total = sum(counts.values(), Counter())
        rows.append(("all", *(total[v] for v in verdicts)))
        out.print(
            table(
                f"Golden cases in {folder}", ("file", "passed", "failed", "skipped, unstable"), rows
            )
        )
        for name, case in failures[:20]:
            out.print(f"[red]{name} {case.name}[/]: {case.why}")
    if failures:
        raise typer.Exit(1)


def inputs(paths: list[Path], frames: int, decoder: str, as_json: bool) -> None:
    """What each input gives; a folder without images stands for the files in it."""
    from stream.sources import Uniform
    from stream.sources.survey import survey

    found: list[Path] = []
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() else []
        videos = [p for p in inside if not p.is_dir()]
        found += videos or [path]
    rows = survey(found, Uniform(frames), decoder)  # type: ignore[arg-type]
    if as_json:
        print_json(rows)
    else:
        columns = list(rows[0])
        cells = [[Path(v).name if k == "path" else v for k, v in r.items()] for r in rows]
        out.print(table("Inputs", columns, cells))
    if any(r["result"] == "error" for r in rows):
        raise typer.Exit(1)


def reducers(names: list[str] | None, as_json: bool) -> None:
    """Findings of the reducer contract."""
    from stream.check import check_reducer
    from stream.registry import reducer_names

    findings = {name: check_reducer(name) for name in names or reducer_names()}
    if as_json:
        print_json(findings)
    else:
        rows = [
            (n, "[red]fails[/]" if f else "[green]holds[/]", "\n".join(f))
            for n, f in findings.items()
        ]
        out.print(table("Reducer contract", ("method", "contract", "findings"), rows))
    if any(findings.values()):
        raise typer.Exit(1)
