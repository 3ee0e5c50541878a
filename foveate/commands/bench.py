"""`foveate bench quality | merge | decode`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast, get_args

from ..show import err, out, print_json, progress_bars, table


def quality(
    model: str,
    reducers: str,
    retain: str,
    videos: int,
    frames: int,
    split: str,
    positions: str,
    device: str | None,
    dtype: Literal["float32", "bfloat16"],
    workers: int,
    seed: int,
    folder: Path,
    overrides: list[str],
    as_json: bool,
) -> None:
    """Run what is not done yet, then print the table and write it beside the pieces."""
    from policies.adapter import VideoAdapter
    from policies.video.tiny import dataset
    from policies.video.tiny.world import Split
    from stream.config import content_hash, dump
    from stream.errors import ConfigError
    from stream.registry import reducer_names

    from .. import quality as engine
    from ..settings import reducer_of, variants

    every = reducers == "all"
    methods = sorted({*reducer_names(), *variants()}) if every else reducers.split(",")
    methods = [m.strip().replace("-", "_") for m in methods]
    built = {method: reducer_of(method, overrides) for method in methods}
    if every:
        methods = [m for m in methods if VideoAdapter.fits(built[m])]
    ratios = [float(r) for r in retain.split(",")]
    config = engine.QualityConfig(
        model=model,
        videos=videos,
        frames=frames,
        split=split,
        positions=positions,
        seed=seed,
        dtype=dtype,
        settings=tuple(sorted(overrides)),
    )
    if split not in get_args(Split):
        raise ConfigError(f"There is no split '{split}'; there are {', '.join(get_args(Split))}.")
    manifest = dataset.build(cast(Split, split), videos, folder / "data")
    run_folder = folder / content_hash(config)
    run_folder.mkdir(parents=True, exist_ok=True)
    (run_folder / "config.yaml").write_text(dump(config))
    log = run_folder / "pieces.jsonl"
    done = {p.key for p in engine.read_pieces(log)}
    jobs = engine.jobs_of(dataset.load(manifest), methods, ratios, done)
    with progress_bars({"videos": len(jobs)}) as progress:
        for i, pieces in enumerate(engine.run_jobs(jobs, config, device, workers), start=1):
            engine.append_pieces(log, pieces)
            progress("videos", i)
    pieces = engine.read_pieces(log)
    rows = engine.rows_of(pieces, seed)
    wanted = {*methods, "identity", "blank"}
    rows = [r for r in rows if r.method in wanted and r.retain in {*ratios, 1.0}]
    result = {
        "config": config.model_dump(),
        "machine": machine(device),
        "workers": workers,
        "rows": [asdict(r) for r in rows],
        "holitom_minus": _duels(engine, pieces, methods, ratios, seed),
    }
    (run_folder / "results.json").write_text(json.dumps(result, indent=2))
    if as_json:
        print_json(result)
        return
    out.print(_quality_table(rows, config))
    out.print(_type_table(rows))
    err.print(f"written: {run_folder}/results.json")


def _duels(
    engine: Any, pieces: list[Any], methods: list[str], ratios: list[float], seed: int
) -> list[dict[str, Any]]:
    """HoliTom against every other method at equal tokens, paired by video."""
    have = {(p.method, p.retain) for p in pieces}
    duels = []
    for ratio in (r for r in ratios if r < 1):
        for other in methods:
            pair = (("holitom", ratio), (other, ratio))
            if other != "holitom" and set(pair) <= have:
                gap, low, high = engine.paired_difference(pieces, *pair, seed)
                duels.append(
                    {"retain": ratio, "other": other, "points": gap, "low": low, "high": high}
                )
    return duels


def _quality_table(rows: list[Any], config: Any) -> Any:
    columns = (
        "method",
        "retain",
        "accuracy %",
        "of full %",
        "minus full (95 %)",
        "tokens",
        "mean over layers",
        "encode ms",
        "reduce ms",
        "prefill ms",
    )
    cells = [
        (
            r.method,
            f"{r.retain:g}",
            f"{r.accuracy:.1f}",
            f"{r.relative:.1f}",
            f"{r.minus_full:+.1f} [{r.low:+.1f}, {r.high:+.1f}]",
            f"{r.tokens:.0f}",
            f"{r.layer_tokens:.0f}",
            *(f"{r.ms.get(s, 0):.0f}" for s in ("encode", "reduce", "prefill")),
        )
        for r in rows
    ]
    title = (
        f"{config.model}, {config.split}, {config.videos} videos, n = {rows[0].n}, "
        f"{config.frames} frames, positions {config.positions}, {config.dtype}, seed {config.seed}"
    )
    return table(title, columns, cells)


def _type_table(rows: list[Any]) -> Any:
    kinds = sorted(rows[0].by_type)
    cells = [
        (r.method, f"{r.retain:g}", *(f"{r.by_type.get(k, 0):.0f}" for k in kinds)) for r in rows
    ]
    return table("Accuracy % by question type", ("method", "retain", *kinds), cells)


def merge(
    frames: int,
    patches: int,
    channels: int,
    retain: float,
    threads: int,
    device: str,
    dtype: str,
    repeats: int,
    seed: int,
    as_json: bool,
) -> None:
    """Print one row of costs."""
    import torch

    from stream.errors import ConfigError

    from ..speed import merge_cost

    side = round(patches**0.5)
    if side * side != patches:
        raise ConfigError(f"{patches} patches are no square grid; give 196, 169, 729 ...")
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ConfigError(f"'{dtype}' is no floating-point type; give float32 or bfloat16.")
    torch.set_num_threads(threads)
    cost = merge_cost(frames, side, channels, retain, repeats, seed, kind, device)
    if as_json:
        print_json(cost | {"machine": machine(device)})
        return
    rows = [(k, f"{v:.2f}" if isinstance(v, float) else v) for k, v in cost.items()]
    out.print(table("HoliTom's stage before the model", ("what", "value"), rows))


def decode(video: Path, frames: int, as_json: bool) -> None:
    """Resident memory at each minute of media."""
    from stream.sources import Fps, Uniform
    from stream.sources.survey import memory_trace

    points = []
    minute = 0
    last = None
    for point in memory_trace(video, Uniform(frames) if frames else Fps(1.0)):
        last = point
        if point.media_s >= minute * 60:
            points.append(point)
            minute = int(point.media_s // 60) + 1
    if last is not None and points[-1] is not last:
        points.append(last)
    if as_json:
        print_json([{"media_s": p.media_s, "rss_mib": p.rss_mib} for p in points])
        return
    rows = [(f"{p.media_s / 60:.1f}", f"{p.rss_mib:.0f}") for p in points]
    out.print(table(f"Resident memory while reading {video}", ("media minute", "MiB"), rows))


def machine(device: str | None) -> str:
    """The device a figure was measured on, in words."""
    import os
    import platform

    import torch

    if (device or "").startswith("cuda") or (device is None and torch.cuda.is_available()):
        gpus = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
        return f"{gpus}, torch {torch.__version__}"
    return f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}"
