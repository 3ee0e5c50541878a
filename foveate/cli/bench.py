"""Declares `foveate bench ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..settings import CONFIGS
from .apps import bench_app
from .options import ConfigFile, Device, Json, Method, Model, Override, overrides

Precision = Literal["float32", "bfloat16"]


@bench_app.command("quality")
def bench_quality(
    model: Annotated[str, typer.Option(help="Name in the box or checkpoint folder.")] = (
        "tiny-video"
    ),
    reducers: Annotated[str, typer.Option(help="Names by comma, or all.")] = "all",
    retain: Annotated[str, typer.Option(help="Shares by comma.")] = "1,0.25,0.2,0.15,0.1,0.05",
    videos: Annotated[int, typer.Option(help="Videos; each has about 12 questions.")] = 100,
    frames: Annotated[int, typer.Option(help="Frames a video.")] = 32,
    split: Annotated[str, typer.Option(help="heldout, or train for tuning.")] = "heldout",
    positions: Annotated[str, typer.Option(help="keep or renumber.")] = "keep",
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...")] = None,
    dtype: Annotated[Precision, typer.Option(help="Of the model.")] = "float32",
    workers: Annotated[int, typer.Option(help="Processes; more than one disturbs the ms.")] = 1,
    seed: Annotated[int, typer.Option(help="Of random choices.")] = 0,
    out: Annotated[Path, typer.Option(help="Run folder; what is done is not run again.")] = (
        Path("runs/quality")
    ),
    override: Annotated[
        list[str] | None, typer.Option("--set", help="Of one reducer: holitom.tau=0.7")
    ] = None,
    as_json: Json = False,
) -> None:
    """Accuracy of every method at every retain ratio on held-out questions."""
    from ..commands import bench as command

    command.quality(
        model,
        reducers,
        retain,
        videos,
        frames,
        split,
        positions,
        device,
        dtype,
        workers,
        seed,
        out,
        override or [],
        as_json,
    )


@bench_app.command("merge")
def bench_merge(
    frames: Annotated[int, typer.Option(help="Frames.")] = 32,
    patches: Annotated[int, typer.Option(help="Patches a frame, a square.")] = 196,
    channels: Annotated[int, typer.Option(help="Channels.")] = 3584,
    retain: Annotated[float, typer.Option(help="Share of tokens to keep.")] = 0.15,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 ...")] = "float32",
    repeats: Annotated[int, typer.Option(help="Timed runs.")] = 21,
    seed: Annotated[int, typer.Option(help="Of the synthetic features.")] = 0,
    as_json: Json = False,
) -> None:
    """Time and memory of HoliTom's whole stage before the model, on synthetic features."""
    from ..commands import bench as command

    command.merge(frames, patches, channels, retain, threads, device, dtype, repeats, seed, as_json)


@bench_app.command("decode")
def bench_decode(
    video: Annotated[Path, typer.Argument(help="A video file, best a long one.")],
    frames: Annotated[int, typer.Option(help="Uniform frames; 0 samples one a second.")] = 0,
    as_json: Json = False,
) -> None:
    """Resident memory while a long file is read."""
    from ..commands import bench as command

    command.decode(video, frames, as_json)


@bench_app.command("controller")
def bench_controller(
    card: Annotated[Path | None, typer.Option(help="Of `foveate calibrate`.")] = None,
    budget_ms: Annotated[float | None, typer.Option(help="From picture to actions.")] = None,
    ticks: Annotated[int, typer.Option(help="Ticks a world.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Of worlds and times.")] = 1,
    as_json: Json = False,
) -> None:
    """The deadline controller in synthetic worlds: drift, bursts, a stuck camera."""
    from ..commands import bench_controller as command

    command.controller(card, budget_ms, ticks, seed, as_json)


@bench_app.command("control")
def bench_control(
    files: Annotated[list[Path] | None, typer.Argument(help="Files of result lines.")] = None,
    play: Annotated[
        Path | None, typer.Option(help="Play episodes into this file; it goes on where it was.")
    ] = None,
    arms: Annotated[
        str, typer.Option(help="METHOD@SHARE, METHOD@deadline, oracle, blank; by comma.")
    ] = "vla_pruner@deadline,vla_pruner@1,vla_pruner@0.0625,oracle,blank",
    tasks: Annotated[str, typer.Option(help="Environments by comma.")] = (
        "metaworld:reach-moving,metaworld:reach-jump,metaworld:push-conveyor"
    ),
    budgets: Annotated[str, typer.Option(help="Milliseconds by comma; none: it waits.")] = "",
    episodes: Annotated[int, typer.Option(help="Of each task; the same seeds for all.")] = 20,
    baseline: Annotated[
        str | None, typer.Option(help="METHOD, METHOD@SHARE or METHOD@deadline.")
    ] = None,
    only: Annotated[str | None, typer.Option(help="Sum up these tasks alone.")] = None,
    plot: Annotated[Path | None, typer.Option(help="A picture: .png.")] = None,
    workers: Annotated[int, typer.Option(help="Processes, of one thread each.")] = 1,
    model: Model = None,
    reducer: Method = None,
    time: Annotated[str | None, typer.Option(help="wall, card:FILE or ms:60.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first episode.")] = None,
    device: Device = None,
    config: ConfigFile = CONFIGS / "drive" / "default.yaml",
    override: Override = None,
    as_json: Json = False,
) -> None:
    """Success against kept tokens in a world that waits, and against milliseconds in one that
    does not."""
    from stream.config import load

    from ..commands import bench_control as command
    from ..settings import DriveSettings

    options = overrides(override, model=model, reducer=reducer, time=time, seed=seed, device=device)
    settings = load(config, DriveSettings, options)
    command.control(
        files or [],
        play,
        arms,
        tasks,
        budgets,
        episodes,
        settings,
        workers,
        baseline,
        only,
        plot,
        as_json,
    )
