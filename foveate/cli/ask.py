"""Declares the commands that answer questions about video files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..settings import CONFIGS
from .apps import app
from .options import (
    ConfigFile,
    Device,
    Fps,
    Frames,
    Json,
    Method,
    Model,
    Override,
    Retain,
    Runner,
    overrides,
)


@app.command()
def ask(
    video: Annotated[
        str,
        typer.Argument(help="A video file, an image, a folder of images, a dataset's DIR#12/top."),
    ],
    question: Annotated[list[str], typer.Argument(help="One or more questions.")],
    model: Model = None,
    reducer: Method = None,
    retain: Retain = None,
    frames: Frames = None,
    fps: Fps = None,
    decoder: Annotated[str | None, typer.Option(help="pyav or decord.")] = None,
    positions: Annotated[str | None, typer.Option(help="keep or renumber.")] = None,
    runner: Runner = None,
    device: Device = None,
    seed: Annotated[int | None, typer.Option(help="Of random choices.")] = None,
    config: ConfigFile = CONFIGS / "ask" / "default.yaml",
    override: Override = None,
    overlay: Annotated[
        Path | None, typer.Option(help="Draw what became of every patch: .png or .mp4.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Ask a video a question."""
    from stream.config import load

    from ..commands import ask as command
    from ..settings import AskConfig

    options = overrides(
        override,
        model=model,
        reducer=reducer,
        retain=retain,
        frames=frames,
        fps=fps,
        decoder=decoder,
        positions=positions,
        runner=runner,
        device=device,
        seed=seed,
    )
    settings = load(config, AskConfig, options)
    command.ask(video, question, settings, overlay, as_json)


@app.command()
def batch(
    manifest: Annotated[
        Path, typer.Argument(help=".jsonl, .csv, .parquet or .json: video, question, options, id.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run; the same one goes on with it.")],
    model: Model = None,
    reducer: Method = None,
    retain: Retain = None,
    frames: Frames = None,
    fps: Fps = None,
    device: Device = None,
    runner: Runner = None,
    workers: Annotated[int | None, typer.Option(help="Models at work at once, over Ray.")] = None,
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster that sees the videos at the same paths.")
    ] = None,
    videos: Annotated[
        Path | None, typer.Option(help="Where relative paths start; else the manifest's folder.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of the reduced tokens.")] = None,
    retry_errors: Annotated[bool, typer.Option(help="Try failed videos again.")] = False,
    config: ConfigFile = CONFIGS / "batch" / "default.yaml",
    override: Override = None,
    as_json: Json = False,
) -> None:
    """Answer a manifest of questions, each video seen once; a killed run goes on where it was."""
    from stream.config import load

    from ..commands import batch as command

    options = overrides(
        override,
        model=model,
        reducer=reducer,
        retain=retain,
        frames=frames,
        fps=fps,
        device=device,
        runner=runner,
        workers=workers,
    )
    settings = load(config, command.BatchConfig, options)
    command.batch(manifest, out, settings, videos, cache, address, retry_errors, as_json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("runs/demo"),
    runner: Annotated[str, typer.Option(help="ray or inline.")] = "ray",
    as_json: Json = False,
) -> None:
    """Ask a shipped sample, with few tokens and with all, and draw where the tokens went."""
    from ..commands import demo as command

    command.demo(out, runner, as_json)
