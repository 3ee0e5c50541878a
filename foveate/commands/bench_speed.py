"""`foveate bench ttft | step | throughput | select`."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..show import err, out, print_json, progress_bars, table
from .bench import machine


@dataclass(frozen=True, slots=True)
class Timing:
    """What the three commands share; the fields are their options."""

    model: str
    reducer: str
    retain: str
    frames: int
    cameras: int | None
    decode: int
    device: str | None
    dtype: str | None
    threads: int
    repeats: int
    warmup: int
    seconds: float
    seed: int
    folder: Path
    as_json: bool


def latency(kind: str, options: Timing, soak_steps: int) -> None:
    """One request at a time: every arm, its stages, and the latency card."""
    from policies.graphs.capture import GraphPool

    from ..timing import arms, measure
    from ..timing.kinds import eager_arm, fixed_arm

    _check_kind(kind, options.model)
    subject, reducer = _prepared(options)
    pool = GraphPool(subject.device)
    held_before = _reserved_mib(subject)
    fixed = [fixed_arm(subject, None, 1.0, 1, pool)]
    every: list[arms.Arm] = [eager_arm(subject, None, 1.0, 1), *fixed]
    outer = _before_only(reducer)
    for ratio in _ratios(options):
        fixed.append(fixed_arm(subject, reducer, ratio, 1, pool))
        every += [eager_arm(subject, reducer, ratio, 1), fixed[-1]]
        if kind == "ttft" and subject.tower is not None:
            every.append(arms.MergingArm(subject, reducer, ratio, 1, pool))
            every.append(arms.SkippingArm(subject, reducer, ratio, 1, pool))
        if kind == "ttft" and outer is not None:
            every.append(arms.AttachedArm(subject, outer, ratio, 1, pool))
    if kind == "ttft":
        every.append(arms.AttachedArm(subject, None, 1.0, 1, pool))
    run = _timed(every, options)
    rows = measure.rows_of(every, run)
    result = _described(options, subject) | {
        "rows": rows,
        "us_per_token": measure.slopes_us(rows),
        "graphs": {
            "captured": pool.captured,
            "warmup_s": pool.warmup_s,
            "fallen_back": pool.fallen_back,
            "held_mib": _reserved_mib(subject) - held_before,
        },
    }
    if soak_steps:
        result["soak"] = measure.soak(fixed, soak_steps, options.seed)
    card = measure.card_of(
        subject, every, run, machine(options.device), options.warmup, options.seed
    )
    _written(options, kind, result)
    card.save(options.folder / f"card_{_file_name(options)}.json")
    if options.as_json:
        print_json(result)
        return
    out.print(_latency_table(kind, result))
    for arm, slope_us in result["us_per_token"].items():
        out.print(f"{arm}: {slope_us:.2f} us a visual token, a line through all its buckets")
    if soak_steps:
        out.print(f"soak: {result['soak']}")


def throughput(options: Timing, concurrency: str) -> None:
    """Many requests at once: requests a second of every arm."""
    from policies.graphs.capture import GraphPool

    from ..timing import measure
    from ..timing.clock import HOST
    from ..timing.kinds import eager_arm, fixed_arm

    subject, reducer = _prepared(options)
    rows: list[dict[str, Any]] = []
    for batch in (int(b) for b in concurrency.split(",")):
        pool = GraphPool(subject.device)
        every = [
            eager_arm(subject, None, 1.0, batch),
            fixed_arm(subject, None, 1.0, batch, pool),
        ]
        for ratio in _ratios(options):
            every += [
                eager_arm(subject, reducer, ratio, batch),
                fixed_arm(subject, reducer, ratio, batch, pool),
            ]
        found = measure.rows_of(every, _timed(every, options))
        for row in found:
            if row["ms"]:
                row["requests_per_s"] = batch / row["ms"][HOST]["p50"] * 1e3
        rows += found
        every.clear()
        _freed()
    result = _described(options, subject) | {"rows": rows}
    _written(options, "throughput", result)
    if options.as_json:
        print_json(result)
        return
    out.print(_throughput_table(result))


def select(
    cameras: str,
    retain: float,
    device: str | None,
    dtype: str | None,
    repeats: int,
    seed: int,
    as_json: bool,
) -> None:
    """One row for each number of cameras."""
    from ..timing.selection import selection_cost

    device, kind = _where(device, dtype)
    rows = [selection_cost(int(c), retain, repeats, seed, kind, device) for c in cameras.split(",")]
    if as_json:
        print_json({"machine": machine(device), "rows": rows})
        return
    cells = [
        (r["tokens"], r["kept"], *(f"{r[how]['p50']:.3f}" for how in ("eager", "graph")))
        for r in rows
    ]
    title = f"VLA-Pruner's selection, median ms, {machine(device)}"
    out.print(table(title, ("tokens", "kept", "eager", "graph"), cells))


def usual_reducer(model: str) -> str:
    """Of a robot policy, or of a video LLM."""
    from ..timing.shapes import acts

    return "vla_pruner" if acts(model) else "holitom"


def _check_kind(kind: str, model: str) -> None:
    from stream.errors import ConfigError

    from ..timing.shapes import acts

    if acts(model) and kind == "ttft":
        raise ConfigError(f"{model} is a robot policy; `foveate bench step` times its steps.")
    if not acts(model) and kind == "step":
        raise ConfigError(f"{model} is a video LLM; `foveate bench ttft` times its first token.")


def _where(device: str | None, dtype: str | None) -> tuple[str, Any]:
    """(device, dtype): what was given, or a GPU if there is one and its usual type."""
    import torch

    from ..timing.shapes import dtype_of

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return device, dtype_of(dtype or ("bfloat16" if device.startswith("cuda") else "float32"))


def _prepared(options: Timing) -> tuple[Any, Any]:
    """(subject, reducer) of some options."""
    import warnings

    import torch

    from policies.models import quiet

    from ..settings import reducer_of
    from ..timing import shapes

    quiet()
    warnings.simplefilter("once")
    torch.set_num_threads(options.threads)
    device, dtype = _where(options.device, options.dtype)
    subject = shapes.subject(
        options.model, options.frames, options.decode, options.cameras, device, dtype
    )
    return subject, reducer_of(options.reducer, [])


def _before_only(reducer: Any) -> Any:
    """The part of a reducer that does not ask what the question is; None where there is none."""
    if reducer.site.in_llm:
        return None
    return reducer.model_copy(update={"inner": None}) if hasattr(reducer, "inner") else reducer


def _ratios(options: Timing) -> list[float]:
    return [float(r) for r in options.retain.split(",")]


def _timed(every: list[Any], options: Timing) -> Any:
    from ..timing.measure import interleaved

    with progress_bars({"rounds": options.warmup + options.repeats}) as progress:
        return interleaved(
            every,
            repeats=options.repeats,
            warmup=options.warmup,
            seed=options.seed,
            seconds=options.seconds,
            progress=progress,
        )


def _described(options: Timing, subject: Any) -> dict[str, Any]:
    prompt, grid = subject.prompt, subject.grid
    return {
        "model": options.model,
        "weights": subject.weights,
        "reducer": options.reducer,
        "grid": [grid.frames, grid.rows, grid.cols],
        "text": prompt.before + prompt.after,
        "decode": prompt.decode,
        "slots": prompt.slots,
        "flow_steps": prompt.flow_steps,
        "machine": machine(options.device),
        "threads": options.threads,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "repeats": options.repeats,
        "warmup": options.warmup,
        "seed": options.seed,
    }


def _reserved_mib(subject: Any) -> float:
    import torch

    return torch.cuda.memory_reserved() / 2**20 if subject.device.type == "cuda" else 0.0


def _freed() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _file_name(options: Timing) -> str:
    views = f"_{options.cameras}_cameras" if (options.cameras or 1) > 1 else ""
    return options.model.replace("/", "_").replace("-", "_").replace(".", "_") + views


def _written(options: Timing, kind: str, result: dict[str, Any]) -> None:
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / f"{kind}_{_file_name(options)}.json"
    path.write_text(json.dumps(result, indent=1))
    for row in result["rows"]:
        if row["left_out"]:
            err.print(f"left out: {row['arm']}, {row['retain']:g} kept: {row['left_out']}")
    err.print(f"written: {path}")


def _latency_table(kind: str, result: dict[str, Any]) -> Any:
    every = ("encode", "reduce", "prefill", "question", "denoise", "action_head")
    stages = tuple(s for s in every if any(s in row["ms"] for row in result["rows"]))
    columns = (
        "arm",
        "retain",
        "visual",
        "kept",
        *(stage.replace("_", " ") for stage in stages),
        "a token",
        "first",
        "p95",
        "total",
        "host",
        "TFLOP",
        "first x",
        "total x",
        "us/token",
        "error",
        "same tokens",
        "feature error",
    )
    cells = [_latency_cells(row, stages, max(1, result["decode"])) for row in result["rows"]]
    title = (
        f"{kind}: {result['model']} ({result['weights']} weights), {result['reducer']}, grid "
        f"{'x'.join(map(str, result['grid']))}, {result['text']} text places, {result['decode']} "
        f"tokens after the first; median ms; {result['dtype']}, {result['machine']}; "
        f"{result['graphs']['captured']} graphs in {result['graphs']['warmup_s']:.1f} s"
    )
    return table(title, columns, cells)


def _latency_cells(row: dict[str, Any], stages: tuple[str, ...], decode: int) -> tuple[str, ...]:
    ms = row["ms"]
    if not ms:
        return (
            row["arm"],
            f"{row['retain']:g}",
            str(row["visual"]),
            str(row["kept"]),
            *[_left_out(row)] * (len(stages) + 12),
        )
    faster, agreed = row.get("times_faster", {}), row.get("agreement", {})
    return (
        row["arm"],
        f"{row['retain']:g}",
        str(row["visual"]),
        str(row["kept"]),
        *(f"{ms[s]['p50']:.2f}" if s in ms else "-" for s in stages),
        f"{ms['tokens']['p50'] / decode:.2f}" if "tokens" in ms else "-",
        f"{ms['first']['p50']:.2f}",
        f"{ms['first']['p95']:.2f}",
        f"{ms['total']['p50']:.2f}",
        f"{ms['host']['p50']:.2f}",
        f"{sum(row['tflop'].values()):.3g}",
        f"{faster['first']:.2f}" if faster else "-",
        f"{faster['total']:.2f}" if faster else "-",
        f"{row['us_per_token']:.2f}" if "us_per_token" in row else "-",
        *(f"{agreed[k]:.2g}" if k in agreed else "-" for k in ("relative_error", "equal_tokens")),
        "-" if row["feature_error"] is None else f"{row['feature_error']:.3f}",
    )


def _left_out(row: dict[str, Any]) -> str:
    """Why a row was not timed, in few words."""
    return str(row["left_out"]).partition(":")[0]


def _throughput_table(result: dict[str, Any]) -> Any:
    columns = ("at once", "arm", "retain", "requests/s", "host ms", "peak MiB", "times faster")
    cells = [
        (
            str(row["batch"]),
            row["arm"],
            f"{row['retain']:g}",
            f"{row['requests_per_s']:.2f}" if row["ms"] else _left_out(row),
            f"{row['ms']['host']['p50']:.1f}" if row["ms"] else "-",
            f"{row['peak_mib'] or 0:.0f}",
            f"{row['times_faster']['host']:.2f}" if row.get("times_faster") else "-",
        )
        for row in result["rows"]
    ]
    title = (
        f"throughput: {result['model']} ({result['weights']} weights), {result['reducer']}, "
        f"{result['decode']} tokens after the first; {result['dtype']}, {result['machine']}"
    )
    return table(title, columns, cells)
