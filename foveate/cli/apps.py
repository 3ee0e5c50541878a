"""The groups that commands belong to."""

from __future__ import annotations

import typer

app = typer.Typer(
    help="Visual-token pruning for video LLMs and robot policies, inside a latency budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
check_app = typer.Typer(help="Check reducers, goldens and inputs.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure quality and speed.", no_args_is_help=True)
app.add_typer(check_app, name="check")
app.add_typer(bench_app, name="bench")
