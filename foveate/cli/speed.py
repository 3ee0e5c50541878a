"""Declares `foveate bench ttft | step | throughput | answer | select | encoder`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .apps import bench_app
from .options import Device, Json

Shape = Annotated[str, typer.Option(help="Shape, model in the box, folder or hub name.")]
Shares = Annotated[str, typer.Option(help="Shares of visual tokens by comma.")]
Cut = Annotated[str, typer.Option(help="Reducer or variant.")]
Dtype = Annotated[str | None, typer.Option(help="Default: bfloat16 on a GPU, float32 on a CPU.")]
Threads = Annotated[int, typer.Option(help="CPU threads.")]
Repeats = Annotated[int, typer.Option(help="Rounds; each visits every arm once.")]
Warmup = Annotated[int, typer.Option(help="Rounds before the first sample.")]
Seconds = Annotated[float, typer.Option(help="No new round begins after this, past the third.")]
Cameras = Annotated[
    int | None, typer.Option(help="Pictures of one step of a policy; default: its own, or one.")
]
Seed = Annotated[int, typer.Option(help="Of pixels, text and order.")]
Soak = Annotated[int, typer.Option(help="Decode steps with changing buckets, 0 = none.")]
Out = Annotated[Path, typer.Option(help="Folder of the JSON files.")]
FOLDER = Path("runs/speed")


@bench_app.command("ttft")
def bench_ttft(
    model: Shape = "tiny-video",
    reducer: Cut = "holitom",
    retain: Shares = "0.5,0.25,0.1",
    frames: Annotated[int, typer.Option(help="Frames a video.")] = 32,
    decode: Annotated[int, typer.Option(help="Tokens after the first.")] = 8,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = 2,
    repeats: Repeats = 20,
    warmup: Warmup = 2,
    seconds: Seconds = 120.0,
    seed: Seed = 0,
    soak: Soak = 0,
    out: Out = FOLDER,
    as_json: Json = False,
) -> None:
    """Time to first token: eager and graph-captured, with all visual tokens and with few."""
    from ..commands import bench_speed as command

    options = command.Timing(
        model,
        reducer,
        retain,
        frames,
        None,
        decode,
        device,
        dtype,
        threads,
        repeats,
        warmup,
        seconds,
        seed,
        out,
        as_json,
    )
    command.latency("ttft", options, soak)


@bench_app.command("step")
def bench_step(
    model: Shape = "tiny-openvla",
    reducer: Cut = "vla_pruner",
    retain: Shares = "0.5,0.25,0.125",
    cameras: Cameras = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = 2,
    repeats: Repeats = 30,
    warmup: Warmup = 3,
    seconds: Seconds = 60.0,
    seed: Seed = 0,
    soak: Soak = 0,
    out: Out = FOLDER,
    as_json: Json = False,
) -> None:
    """A control step of a robot policy, the same ways."""
    from ..commands import bench_speed as command

    options = command.Timing(
        model,
        reducer,
        retain,
        0,
        cameras,
        0,
        device,
        dtype,
        threads,
        repeats,
        warmup,
        seconds,
        seed,
        out,
        as_json,
    )
    command.latency("step", options, soak)


@bench_app.command("throughput")
def bench_throughput(
    model: Shape = "tiny-video",
    reducer: Annotated[
        str | None, typer.Option(help="Default: holitom, or vla_pruner of a robot policy.")
    ] = None,
    retain: Shares = "0.1",
    concurrency: Annotated[str, typer.Option(help="Requests at once, by comma.")] = "1,8,32",
    frames: Annotated[int, typer.Option(help="Frames a video.")] = 32,
    cameras: Cameras = None,
    decode: Annotated[int, typer.Option(help="Tokens after the first.")] = 16,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = 2,
    repeats: Repeats = 5,
    warmup: Warmup = 1,
    seconds: Seconds = 60.0,
    seed: Seed = 0,
    out: Out = FOLDER,
    as_json: Json = False,
) -> None:
    """Requests a second when many come at once."""
    from ..commands import bench_speed as command

    options = command.Timing(
        model,
        reducer or command.usual_reducer(model),
        retain,
        frames,
        cameras,
        decode,
        device,
        dtype,
        threads,
        repeats,
        warmup,
        seconds,
        seed,
        out,
        as_json,
    )
    command.throughput(options, concurrency)


@bench_app.command("select")
def bench_select(
    cameras: Annotated[str, typer.Option(help="Cameras of 256 tokens each, by comma.")] = "1,3",
    retain: Annotated[float, typer.Option(help="Share of tokens to keep.")] = 0.125,
    device: Device = None,
    dtype: Dtype = None,
    repeats: Repeats = 50,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Time of VLA-Pruner's selection, launched as it stands and captured as a graph."""
    from ..commands import bench_speed as command

    command.select(cameras, retain, device, dtype, repeats, seed, as_json)


@bench_app.command("answer")
def bench_answer(
    model: Shape = "tiny-video",
    reducer: Cut = "holitom",
    retain: Annotated[float, typer.Option(help="Share of visual tokens to keep.")] = 0.15,
    frames: Annotated[int, typer.Option(help="Frames a video.")] = 32,
    questions: Annotated[int, typer.Option(help="Asked at once, 1 to 3.")] = 1,
    tokens: Annotated[int, typer.Option(help="Of each answer.")] = 32,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = 2,
    repeats: Annotated[int, typer.Option(help="Requests that count, of each way.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the pictures.")] = 0,
    as_json: Json = False,
) -> None:
    """Time of whole answers as `foveate ask` gives them, with captured programs and without."""
    from ..commands import bench_answer as command

    command.answer(
        model,
        reducer,
        retain,
        frames,
        questions,
        tokens,
        device,
        dtype,
        threads,
        repeats,
        seed,
        as_json,
    )


@bench_app.command("encoder")
def bench_encoder(
    share: Annotated[str, typer.Option(help="Patches of a frame encoded again, by comma.")] = (
        "0.125,0.25,0.5"
    ),
    refresh: Annotated[str, typer.Option(help="Frames between key frames, by comma.")] = "8,16",
    videos: Annotated[int, typer.Option(help="Held-out clips, 12 questions each.")] = 20,
    frames: Annotated[int, typer.Option(help="Frames a clip.")] = 32,
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    seed: Annotated[int, typer.Option(help="Of clips and questions.")] = 0,
    as_json: Json = False,
) -> None:
    """Feature error and accuracy of encoders that compute less, with the model in the box.

    Random weights, as the 7B shapes have, would say nothing of either.
    """
    from ..commands import bench_encoder as command

    command.encoder(share, refresh, videos, frames, device, threads, seed, as_json)
