"""Declares the commands that drive robots in simulators."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..settings import CONFIGS
from .apps import app
from .options import ConfigFile, Device, Json, Method, Model, Override, overrides


@app.command()
def drive(
    environment: Annotated[str, typer.Argument(help="metaworld:drawer-open, pusht ...")],
    budget_ms: Annotated[
        float | None, typer.Option(help="From picture to actions; default fits 25 % of tokens.")
    ] = None,
    model: Model = None,
    reducer: Method = None,
    keep: Annotated[
        float | None, typer.Option(help="A fixed share of tokens, instead of the controller.")
    ] = None,
    mode: Annotated[str | None, typer.Option(help="realtime or waiting.")] = None,
    time: Annotated[str | None, typer.Option(help="wall, card:FILE or ms:60.")] = None,
    episodes: Annotated[int | None, typer.Option(help="Episodes, seeds in a row.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first episode.")] = None,
    stop_after: Annotated[int | None, typer.Option(help="Misses in a row.")] = None,
    disturb: Annotated[
        int | None, typer.Option(help="Start and stop a busy process every so many ticks.")
    ] = None,
    record: Annotated[Path | None, typer.Option(help="Folder for `foveate replay`.")] = None,
    rerun: Annotated[Path | None, typer.Option(help="A recording for rerun: .rrd.")] = None,
    video: Annotated[Path | None, typer.Option(help="A quick look: .mp4.")] = None,
    dataset: Annotated[
        Path | None, typer.Option(help="A LeRobotDataset with the keep mask as a feature.")
    ] = None,
    device: Device = None,
    config: ConfigFile = CONFIGS / "drive" / "default.yaml",
    override: Override = None,
    as_json: Json = False,
) -> None:
    """Let a policy act in a simulator that does not wait, inside a budget."""
    from stream.config import load

    from ..commands import drive as command
    from ..settings import DriveSettings

    options = overrides(
        override,
        budget_ms=budget_ms,
        model=model,
        reducer=reducer,
        keep=keep,
        mode=mode,
        time=time,
        episodes=episodes,
        seed=seed,
        stop_after=stop_after,
        device=device,
    )
    settings = load(config, DriveSettings, options)
    command.drive(environment, settings, disturb, record, rerun, video, dataset, as_json)


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option(help="The card: .json.")],
    model: Model = None,
    reducer: Method = None,
    buckets: Annotated[str | None, typer.Option(help="Token counts by comma.")] = None,
    environment: Annotated[
        str, typer.Option(help="Whose pictures are measured with.")
    ] = "metaworld:drawer-open",
    repeats: Annotated[int, typer.Option(help="Samples a bucket.")] = 200,
    warmup: Annotated[int, typer.Option(help="Rounds before the first sample.")] = 20,
    seed: Annotated[int | None, typer.Option(help="Of the order of measurement.")] = None,
    device: Device = None,
    config: ConfigFile = CONFIGS / "drive" / "default.yaml",
    override: Override = None,
    as_json: Json = False,
) -> None:
    """Measure how long each stage of a robot policy takes here, by token bucket."""
    from stream.config import load

    from ..commands import calibrate as command
    from ..settings import DriveSettings

    options = overrides(override, model=model, reducer=reducer, seed=seed, device=device)
    settings = load(config, DriveSettings, options)
    command.calibrate(settings, environment, out, buckets, repeats, warmup, as_json)


@app.command()
def replay(
    record: Annotated[Path, typer.Argument(help="Folder of `drive --record` or `watch --record`.")],
    budgets: Annotated[str, typer.Option(help="Of an episode: milliseconds by comma.")] = "",
    keeps: Annotated[str, typer.Option(help="Of an episode: shares of tokens by comma.")] = "",
    model: Model = None,
    reducer: Method = None,
    time: Annotated[str | None, typer.Option(help="wall, card:FILE or ms:60.")] = None,
    plot: Annotated[Path | None, typer.Option(help="A picture of the changes: .png.")] = None,
    at: Annotated[float | None, typer.Option(help="Of a stream: a moment, in seconds.")] = None,
    within: Annotated[float, typer.Option(help="Seconds around it.")] = 1.0,
    stream: Annotated[str | None, typer.Option(help="Which of the streams.")] = None,
    device: Device = None,
    override: Override = None,
    as_json: Json = False,
) -> None:
    """An episode again under other budgets, or what became of the frames of a stream."""
    from stream.live.record import is_record

    if is_record(record):
        from ..commands.replay_stream import replay_stream

        replay_stream(record, at, within, stream, as_json)
        return
    from ..commands import replay as command

    options = overrides(override, model=model, reducer=reducer, time=time, device=device)
    command.replay(record, budgets, keeps, options, plot, as_json)
