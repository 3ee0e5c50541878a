"""Declares the commands that attach to live streams."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..settings import CONFIGS
from .apps import app
from .options import ConfigFile, Device, Method, Model, Override, Runner, overrides


@app.command()
def watch(
    source: Annotated[
        list[str],
        typer.Argument(help="rtsp://, http://, camera:0, lavfi:..., a file; or NAME=one of them."),
    ],
    ask: Annotated[list[str] | None, typer.Option(help="Asked again and again.")] = None,
    standing: Annotated[
        list[str] | None, typer.Option(help="Asked as often, told when its answer changes.")
    ] = None,
    every: Annotated[str, typer.Option(help="How often: 5s, 500ms, 1m.")] = "5s",
    seconds: Annotated[float | None, typer.Option(help="Stop after so long.")] = None,
    mode: Annotated[str | None, typer.Option(help="closed or anchor.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames looked at, a second.")] = None,
    tokens_per_s: Annotated[
        float | None, typer.Option(help="Visual tokens a second, each stream.")
    ] = None,
    shared_tokens_per_s: Annotated[
        float | None, typer.Option(help="Instead: for all streams together, by novelty.")
    ] = None,
    policy: Annotated[str | None, typer.Option(help="latest, drop-oldest or block.")] = None,
    model: Model = None,
    reducer: Method = None,
    runner: Runner = None,
    device: Device = None,
    jsonl: Annotated[Path | None, typer.Option(help="Append what is printed, as JSON.")] = None,
    record: Annotated[
        Path | None, typer.Option(help="New folder for a record that `replay` reads.")
    ] = None,
    rerun: Annotated[Path | None, typer.Option(help="Write a recording: .rrd.")] = None,
    archive: Annotated[
        Path | None, typer.Option(help="Folder of what left the window, instead of memory.")
    ] = None,
    config: ConfigFile = CONFIGS / "watch" / "default.yaml",
    override: Override = None,
) -> None:
    """Attach to cameras and answer as they go on; every answer says how old its frames are."""
    from stream.config import load
    from stream.live.watching import Questions

    from ..commands import watch as command

    named = overrides(
        override,
        model=model,
        reducer=reducer,
        runner=runner,
        device=device,
        shared_tokens_per_s=shared_tokens_per_s,
    )
    named += overrides(None, **{"stream.mode": mode, "stream.fps": fps})
    named += overrides(None, **{"stream.tokens_per_s": tokens_per_s, "source.policy": policy})
    settings = load(config, command.WatchConfig, named)
    questions = Questions(tuple(ask or ()), tuple(standing or ()), duration_s(every))
    command.watch(source, settings, questions, seconds, jsonl, record, rerun, archive)


def duration_s(text: str) -> float:
    """`5s`, `500ms`, `1m` or plain seconds."""
    from stream.errors import ConfigError

    units = {"ms": 1e-3, "s": 1.0, "m": 60.0, "": 1.0}
    number = text.rstrip("ms")
    try:
        value = float(number) * units[text[len(number) :]]
    except (ValueError, KeyError):
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"'{text}' is no duration; give one like 5s, 500ms or 1m.")
    return value
