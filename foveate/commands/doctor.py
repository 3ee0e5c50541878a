"""`foveate doctor`."""

from __future__ import annotations

from dataclasses import asdict

import typer

from ..doctor import Status, examine
from ..show import out, print_json, table

_STYLE = {Status.OK: "green", Status.LIMITED: "yellow", Status.MISSING: "red"}


def doctor(as_json: bool) -> None:
    """Print the findings; exit 1 if something that foveate needs is missing."""
    findings = examine()
    if as_json:
        print_json([asdict(f) for f in findings])
    else:
        rows = [
            (f.name, f"[{_STYLE[f.status]}]{f.status}[/]", f.detail, f.advice) for f in findings
        ]
        out.print(table("This machine", ("part", "status", "found", "what to do"), rows))
    if any(f.status is Status.MISSING for f in findings):
        raise typer.Exit(1)
