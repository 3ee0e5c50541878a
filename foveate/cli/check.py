"""Declares `foveate check ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .apps import check_app
from .options import Json


@check_app.command("golden")
def check_golden(
    folder: Annotated[Path, typer.Argument(help="Folder of golden .npz files.")],
    as_json: Json = False,
) -> None:
    """Compare with stored outputs of a reference implementation; exit 1 on any failure."""
    from ..commands import check as command

    command.golden(folder, as_json)


@check_app.command("inputs")
def check_inputs(
    paths: Annotated[list[Path], typer.Argument(help="Files, folders, pipes.")],
    frames: Annotated[int, typer.Option(help="Frames to sample from each.")] = 32,
    decoder: Annotated[str, typer.Option(help="pyav or decord.")] = "pyav",
    as_json: Json = False,
) -> None:
    """Read each input and say what came of it; exit 1 if any gave nothing."""
    from ..commands import check as command

    command.inputs(paths, frames, decoder, as_json)


@check_app.command("reducer")
def check_reducer(
    names: Annotated[list[str] | None, typer.Argument(help="Default: all of them.")] = None,
    as_json: Json = False,
) -> None:
    """Run the reducer contract; exit 1 on any finding."""
    from ..commands import check as command

    command.reducers(names, as_json)
