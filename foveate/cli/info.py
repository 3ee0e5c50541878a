"""Declares the commands that say what is here."""

from __future__ import annotations

from typing import Annotated

import typer

from .apps import app
from .options import Json


@app.command()
def methods(
    markdown: Annotated[bool, typer.Option(help="As the README table.")] = False,
    as_json: Json = False,
) -> None:
    """List the reducers: where each acts, what it reads, where it was published."""
    from ..commands import methods as command

    command.methods(markdown, as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine has and lacks, and what to install."""
    from ..commands import doctor as command

    command.doctor(as_json)
