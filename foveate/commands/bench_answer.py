"""`foveate bench answer`."""

from __future__ import annotations

import statistics
from typing import Any

from ..settings import reducer_of
from ..show import out, print_json, table
from .bench import machine


def answer(
    model: str,
    reducer: str,
    retain: float,
    frames: int,
    questions: int,
    tokens: int,
    device: str | None,
    dtype: str | None,
    threads: int,
    repeats: int,
    seed: int,
    as_json: bool,
) -> None:
    """One row for each way to answer: what its first two requests took, the later's median."""
    import torch

    from policies.models import quiet
    from stream.errors import ConfigError

    from ..timing.answers import QUESTIONS, STAGES, answer_again_and_again
    from ..timing.shapes import dtype_of

    if frames < 2 or tokens < 2 or repeats < 2 or not 1 <= questions <= len(QUESTIONS):
        raise ConfigError(
            f"{frames} frames, {questions} questions, {tokens} tokens, {repeats} repeats: give at "
            f"least 2 frames, tokens and repeats, and 1 to {len(QUESTIONS)} questions."
        )
    quiet()
    torch.set_num_threads(threads)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = dtype_of(dtype or ("float32" if where == "cpu" else "bfloat16"))
    ways = answer_again_and_again(
        model,
        reducer_of(reducer),
        retain,
        frames,
        questions,
        tokens,
        repeats,
        seed,
        where,
        kind,
    )
    rows: list[dict[str, Any]] = []
    for way in ways:
        ms = {s: statistics.median(spent[s] for spent in way.later) for s in STAGES}
        wholes = sorted(sum(spent.values()) for spent in way.later)
        rows.append(
            {
                "capture": way.capture,
                "ms": ms,
                "ms_a_token": ms["decode_tokens"] / (tokens - 1),
                "whole_ms": statistics.median(wholes),
                "whole_ms_range": [wholes[0], wholes[-1]],
                "early_requests_ms": way.early,
            }
        )
    told = {
        "model": model,
        "reducer": reducer,
        "retain": retain,
        "frames": frames,
        "questions": questions,
        "tokens": tokens,
        "dtype": str(kind).removeprefix("torch."),
        "n": repeats,
        "seed": seed,
        "machine": machine(where),
        "rows": rows,
    }
    if as_json:
        print_json(told)
        return
    cells = [
        (
            r["capture"],
            *(f"{r['ms'][stage]:.1f}" for stage in STAGES[:3]),
            f"{r['ms_a_token']:.2f}",
            f"{r['whole_ms']:.0f} ({r['whole_ms_range'][0]:.0f} to {r['whole_ms_range'][1]:.0f})",
            ", ".join(f"{sum(spent.values()):.0f}" for spent in r["early_requests_ms"]),
        )
        for r in rows
    ]
    columns = (
        "capture",
        "encode ms",
        "reduce ms",
        "to first token ms",
        "ms a token",
        "whole ms",
        "first two requests ms",
    )
    title = (
        f"{model}, {reducer}, retain {retain:g}, {frames} frames, {questions} questions, "
        f"{tokens} tokens, n = {repeats}, seed {seed}, {told['machine']}"
    )
    out.print(table(title, columns, cells))
