"""`foveate bench stream first-token | accuracy | past | sharing | long | cameras`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

from ..settings import AskConfig, reducer_of
from ..show import err, out, print_json, progress_bars, table
from .ask import load_reasoner
from .bench import machine

MEASURES = ("first-token", "accuracy", "past", "sharing", "long", "cameras")


def stream(
    measure: str,
    model: str,
    reducer: str,
    videos: int,
    frames: int,
    seconds: float,
    fps: float,
    data: Path,
    device: str | None,
    threads: int,
    seed: int,
    folder: Path,
    as_json: bool,
) -> None:
    """Measure one thing, print it, and write it to FOLDER/MEASURE.json.

    What is measured clip by clip goes on where it was stopped.
    """
    import torch

    from stream.errors import ConfigError

    if measure not in MEASURES:
        raise ConfigError(f"There is no measure '{measure}'; there are {', '.join(MEASURES)}.")
    torch.set_num_threads(threads)
    method = reducer_of(reducer)
    reasoner = load_reasoner(AskConfig(model=model, device=device, max_new_tokens=4), method)
    folder.mkdir(parents=True, exist_ok=True)
    with progress_bars({"clips": videos, "frames": frames}) as progress:
        if measure == "long":
            result = _long(reasoner, method, frames, folder, progress)
        elif measure == "cameras":
            result = _cameras(reasoner, method, seconds, fps)
        else:
            log = folder / f"{measure}_{model.rpartition('/')[2]}_{reducer}_{seed}.jsonl"
            result = _clips(measure, reasoner, method, videos, data, seed, log, progress)
    result = {
        "measure": measure,
        "model": model,
        "reducer": reducer,
        "machine": machine(device),
        "threads": threads,
        "seed": seed,
        **result,
    }
    path = folder / f"{measure}.json"
    path.write_text(json.dumps(result, indent=2))
    if as_json:
        print_json(result)
        return
    _show(measure, result)
    err.print(f"written: {path}")


def _clips(
    measure: str,
    model: Any,
    reducer: Any,
    videos: int,
    data: Path,
    seed: int,
    log: Path,
    progress: Any,
) -> dict[str, Any]:
    from policies.video.tiny import dataset

    from .. import live_bench

    manifest = dataset.build("heldout", videos, data)
    by_video = dataset.by_video(dataset.load(manifest))
    items = [(path, [item.question for item in asked]) for path, asked in by_video.items()]
    if measure == "first-token":
        return live_bench.first_token(model, reducer, items, 3, progress)
    return live_bench.measured(measure, model, reducer, items, seed, log, progress)


def _long(model: Any, reducer: Any, frames: int, folder: Path, progress: Any) -> dict[str, Any]:
    from ..live_load import hour_verdict, long_run

    rows = []
    with (folder / "long.jsonl").open("w") as log:
        for row in long_run(model, reducer, frames, 16.0, progress):
            rows.append(row)
            log.write(json.dumps(row) + "\n")
            log.flush()
    return {"rows": rows, **hour_verdict(rows)}


def _cameras(model: Any, reducer: Any, seconds: float, fps: float) -> dict[str, Any]:
    from stream.sources.live_values import Policy

    from ..live_load import cameras, fairness

    policies = list(get_args(Policy))
    rows = list(cameras(model, reducer, policies, seconds, fps))
    fair = {
        policy: fairness([r["encoded_fps"] for r in rows if r["policy"] == policy])
        for policy in policies
    }
    return {"seconds": seconds, "fps": fps, "rows": rows, "fairness": fair}


def _show(measure: str, result: dict[str, Any]) -> None:
    where = f"{result['model']}, {result['reducer']}, seed {result['seed']}, {result['machine']}"
    out.print(where, highlight=False)
    if measure == "first-token":
        for name, stages in result["ms"].items():
            rows = [(stage, f"{ms:.1f}") for stage, ms in stages.items()]
            out.print(table(f"{name}: ms, median of {result['n']}", ("stage", "ms"), rows))
        for mode, times in result["times_faster"].items():
            prefill = result["times_faster_than_its_prefill"][mode]
            out.print(
                f"{mode}: first token {times:.1f} times sooner than offline "
                f"({prefill:.1f} times against offline's prefill alone)"
            )
        return
    if measure in ("long", "cameras"):
        rows = result["rows"]
        cells = [[f"{v:.2f}" if isinstance(v, float) else v for v in r.values()] for r in rows]
        out.print(table(measure, list(rows[0]) if rows else [], cells))
        said = {k: v for k, v in result.items() if k.endswith("_pct") or k == "fairness"}
        out.print(said)
        return
    columns = ("variant", "n", "accuracy %", "minus (95 %)", "tokens", "plans like offline's")
    cells = [
        [
            r["variant"],
            r["n"],
            f"{r['accuracy']:.1f}",
            f"{r['minus']:+.1f} [{r['low']:+.1f}, {r['high']:+.1f}]",
            f"{r['tokens']:.0f}" if r["tokens"] else "-",
            r["same_plans"] or "-",
        ]
        for r in result["rows"]
    ]
    title = f"{measure}: {result['videos']} videos, against the first row, paired by video"
    out.print(table(title, columns, cells))
