"""Declares the commands about scripted experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .apps import app, bench_app
from .options import Json

Episodes = Annotated[int, typer.Option(help="Of each task.")]
Seed = Annotated[int, typer.Option(help="Of the first episode.")]


@app.command()
def demos(
    tasks: Annotated[list[str], typer.Argument(help="metaworld:push ...; one robot's.")],
    out: Annotated[Path, typer.Option(help="The LeRobotDataset; the same one goes on with it.")],
    episodes: Episodes = 50,
    noise: Annotated[
        str, typer.Option(help="On the expert's actions, by comma, an episode each in turn.")
    ] = "0,0.15,0.3",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Record scripted experts as a LeRobotDataset, disturbed so that they recover."""
    from ..commands import demos as command

    command.demos(tasks, out, episodes, noise, seed, as_json)


@bench_app.command("experts")
def bench_experts(
    tasks: Annotated[list[str] | None, typer.Argument(help="Default: all that have one.")] = None,
    episodes: Episodes = 50,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """How often and how fast the scripted experts succeed, and what standing still gives."""
    from ..commands import demos as command

    command.experts(tasks, episodes, seed, as_json)
