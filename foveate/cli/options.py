"""Options that several commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Model = Annotated[str | None, typer.Option(help="Name in the box, folder or hub name.")]
Method = Annotated[str | None, typer.Option(help="See `foveate methods`.")]
Retain = Annotated[float | None, typer.Option(help="Share of visual tokens to keep.")]
Frames = Annotated[int | None, typer.Option(help="Frames, evenly spaced.")]
Fps = Annotated[float | None, typer.Option(help="Frames a second instead.")]
Runner = Annotated[str | None, typer.Option(help="ray or inline.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")]
ConfigFile = Annotated[Path, typer.Option("--config", help="YAML file to start from.")]
Override = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting: settings.tau=0.7")
]


def overrides(given: list[str] | None, **options: object) -> list[str]:
    """--set overrides and then the options that were given, as overrides of a config."""
    named = [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    return [*(given or ()), *named]
