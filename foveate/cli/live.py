"""Declares the commands that attach to live streams."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..settings import CONFIGS
from .apps import app, bench_app
from .options import ConfigFile, Device, Json, Method, Model, Override, Runner, overrides


@app.command()
def watch(
    source: Annotated[
        list[str],
        typer.Argument(
            help="rtsp://, http://, camera:0, lerobot:camera.yaml, sim:metaworld:push, lavfi:..., "
            "a file; or NAME=one of them."
        ),
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
    as_json: Json = False,
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
    command.watch(source, settings, questions, seconds, jsonl, record, rerun, archive, as_json)


@app.command()
def serve(
    model: Model = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    stream: Annotated[
        list[str] | None, typer.Option(help="Attach a camera of any kind: NAME=SOURCE.")
    ] = None,
    allow_root: Annotated[
        list[Path] | None, typer.Option(help="Folder whose files may be read as file://...")
    ] = None,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Fetch http(s):// files.")
    ] = False,
    allow_private: Annotated[
        bool, typer.Option("--allow-private", help="From private addresses too, and cameras there.")
    ] = False,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable that holds the API key.")
    ] = None,
    without_key: Annotated[
        bool, typer.Option("--without-key", help="Listen beyond this machine without an API key.")
    ] = False,
    max_body_mb: Annotated[float | None, typer.Option(help="MiB of a request.")] = None,
    max_duration_s: Annotated[float | None, typer.Option(help="Of a video.")] = None,
    max_pixels: Annotated[int | None, typer.Option(help="Of one picture.")] = None,
    max_frames: Annotated[int | None, typer.Option(help="Of one request.")] = None,
    max_streams: Annotated[int | None, typer.Option(help="Attached at once.")] = None,
    max_request_s: Annotated[float | None, typer.Option(help="For one request.")] = None,
    queue: Annotated[int | None, typer.Option(help="Requests that may wait.")] = None,
    reducer: Method = None,
    device: Device = None,
    config: ConfigFile = CONFIGS / "serve" / "default.yaml",
    override: Override = None,
) -> None:
    """Answer over HTTP as OpenAI's API does: about pictures, videos and attached cameras."""
    from stream.config import load

    from ..commands import serve as command
    from ..serve.service import ServeConfig

    limits = {
        "limits.body_mib": max_body_mb,
        "limits.duration_s": max_duration_s,
        "limits.pixels": max_pixels,
        "limits.frames": max_frames,
        "limits.streams": max_streams,
        "limits.request_s": max_request_s,
        "limits.queue": queue,
    }
    options = overrides(override, model=model, reducer=reducer, device=device, **limits)
    settings = load(config, ServeConfig, options)
    access = command.access_of(
        host, api_key_env, without_key, allow_root or [], allow_remote, allow_private
    )
    command.serve(settings, access, host, port, stream or [])


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


@bench_app.command("stream")
def bench_stream(
    measure: Annotated[
        str,
        typer.Argument(help="first-token, accuracy, past, sharing, long or cameras."),
    ],
    model: Annotated[str, typer.Option(help="Name in the box or folder.")] = "tiny-video",
    reducer: Annotated[str, typer.Option(help="One that acts before the model.")] = (
        "holitom_outer"
    ),
    videos: Annotated[int, typer.Option(help="Held-out clips; about 12 questions each.")] = 86,
    frames: Annotated[int, typer.Option(help="Of the long run.")] = 30_000,
    seconds: Annotated[float, typer.Option(help="Of each drop policy, for cameras.")] = 30.0,
    fps: Annotated[float, typer.Option(help="Asked of each camera.")] = 4.0,
    data: Annotated[Path, typer.Option(help="Folder of the clips.")] = Path("runs/quality/data"),
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    seed: Annotated[int, typer.Option(help="Of random choices and resampling.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/stream"),
    as_json: Json = False,
) -> None:
    """What streaming saves in time and costs in answers, memory over an hour, four cameras."""
    from ..commands import bench_stream as command

    command.stream(
        measure,
        model,
        reducer,
        videos,
        frames,
        seconds,
        fps,
        data,
        device,
        threads,
        seed,
        out,
        as_json,
    )
