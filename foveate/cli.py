"""The command line. Declares commands; what they do lives in commands/."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .settings import CONFIGS

app = typer.Typer(
    help="Visual-token pruning for video LLMs and robot policies, inside a latency budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
check_app = typer.Typer(help="Check reducers, goldens and inputs.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure quality and speed.", no_args_is_help=True)
app.add_typer(check_app, name="check")
app.add_typer(bench_app, name="bench")

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


@app.command()
def ask(
    video: Annotated[str, typer.Argument(help="A video file, an image or a folder of images.")],
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

    from .commands import ask as command
    from .settings import AskConfig

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

    from .commands import batch as command

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
    from .commands import demo as command

    command.demo(out, runner, as_json)


@app.command()
def methods(
    markdown: Annotated[bool, typer.Option(help="As the README table.")] = False,
    as_json: Json = False,
) -> None:
    """List the reducers: where each acts, what it reads, where it was published."""
    from .commands import methods as command

    command.methods(markdown, as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine has and lacks, and what to install."""
    from .commands import doctor as command

    command.doctor(as_json)


@check_app.command("golden")
def check_golden(
    folder: Annotated[Path, typer.Argument(help="Folder of golden .npz files.")],
    as_json: Json = False,
) -> None:
    """Compare with stored outputs of a reference implementation; exit 1 on any failure."""
    from .commands import check as command

    command.golden(folder, as_json)


@check_app.command("inputs")
def check_inputs(
    paths: Annotated[list[Path], typer.Argument(help="Files, folders, pipes.")],
    frames: Annotated[int, typer.Option(help="Frames to sample from each.")] = 32,
    decoder: Annotated[str, typer.Option(help="pyav or decord.")] = "pyav",
    as_json: Json = False,
) -> None:
    """Read each input and say what came of it; exit 1 if any gave nothing."""
    from .commands import check as command

    command.inputs(paths, frames, decoder, as_json)


@check_app.command("reducer")
def check_reducer(
    names: Annotated[list[str] | None, typer.Argument(help="Default: all of them.")] = None,
    as_json: Json = False,
) -> None:
    """Run the reducer contract; exit 1 on any finding."""
    from .commands import check as command

    command.reducers(names, as_json)


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
    from .commands import bench as command

    command.quality(
        model,
        reducers,
        retain,
        videos,
        frames,
        split,
        positions,
        device,
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
    from .commands import bench as command

    command.merge(frames, patches, channels, retain, threads, device, dtype, repeats, seed, as_json)


@bench_app.command("decode")
def bench_decode(
    video: Annotated[Path, typer.Argument(help="A video file, best a long one.")],
    frames: Annotated[int, typer.Option(help="Uniform frames; 0 samples one a second.")] = 0,
    as_json: Json = False,
) -> None:
    """Resident memory while a long file is read."""
    from .commands import bench as command

    command.decode(video, frames, as_json)


def main() -> None:
    """Entry point: errors that foveate raises on purpose are one line and exit code 2."""
    from stream.errors import FoveateError

    from .show import err

    try:
        app(standalone_mode=True)
    except FoveateError as error:
        err.print(f"[bold red]{type(error).__name__}[/]: {error}", highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        err.print("stopped")
        sys.exit(130)
