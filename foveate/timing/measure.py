"""Time the arms of one subject against each other in one run, and sum it up."""

from __future__ import annotations

import datetime
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stream.budgets.latency_card import LatencyCard, StageTiming

from .arms import Arm, FixedArm
from .clock import HOST, StageClock
from .flops import request_flops
from .subjects import Subject

Samples = dict[str, dict[str, list[float]]]
"""Arm's key -> stage -> milliseconds."""

FIRST = "first"
"""Everything until the first token or the actions are there, by the device's clock."""

DISTINCT = 4
"""Different pictures among the requests of a batch."""

TOTAL = "total"
"""All stages of a request, by the device's clock."""


@dataclass(frozen=True, slots=True)
class Run:
    """What came of timing some arms; the keys are theirs.

    answers: tokens or actions; said: first logits or actions; both for the same pixels. peak_mib:
    device memory at the peak beyond what was held before. feature_error: of leaner encoders.
    left_out: why an arm has no samples.
    """

    samples: Samples = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    answers: dict[str, Tensor] = field(default_factory=dict)
    said: dict[str, Tensor] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)
    feature_error: dict[str, float | None] = field(default_factory=dict)


@torch.inference_mode()
def interleaved(
    arms: Sequence[Arm],
    *,
    repeats: int,
    warmup: int,
    seed: int,
    seconds: float = float("inf"),
    progress: Callable[[str, int], None] = lambda stage, done: None,
) -> Run:
    """Requests of all arms in rounds, each round in a new random order.

    An arm that does not fit into the device's memory, alone or beside the others, has no samples,
    nor has one of captured programs of which one had to be launched kernel by kernel.
    seconds: after which no new round begins, once there are three.
    """
    subject = arms[0].subject
    clock = StageClock(subject.device)
    distinct = [subject.pixels(seed + i) for i in range(min(DISTINCT, max(a.batch for a in arms)))]
    pixels = {a.batch: [distinct[i % DISTINCT] for i in range(a.batch)] for a in arms}
    run = Run()
    for arm in arms:
        try:
            with arm, _all_captured(arm), _peak_mib(subject.device) as peak:
                arm.prepare(pixels[arm.batch])
                with clock.request():
                    answer = arm.run(clock, pixels[arm.batch]).cpu()
                said = arm.said.float().cpu()
                feature_error = arm.feature_error(distinct[0])
        except (torch.cuda.OutOfMemoryError, _Uncaptured) as error:
            run.left_out[arm.key] = _why(error)
            torch.cuda.empty_cache()
            continue
        run.answers[arm.key], run.said[arm.key] = answer, said
        run.feature_error[arm.key] = feature_error
        run.peak_mib[arm.key] = peak[0]
        run.samples[arm.key] = {}
    samples = run.samples
    order = random.Random(seed)
    able = [arm for arm in arms if arm.key in samples]
    start_s = time.monotonic()
    for turn in range(warmup + repeats):
        if turn >= warmup + 3 and time.monotonic() - start_s > seconds:
            break
        for arm in order.sample(able, len(able)):
            try:
                with arm, _all_captured(arm), clock.request() as times_ms:
                    arm.run(clock, pixels[arm.batch])
            except (torch.cuda.OutOfMemoryError, _Uncaptured) as error:
                run.left_out[arm.key] = _why(error)
                torch.cuda.empty_cache()
                able.remove(arm)
                del samples[arm.key]
                continue
            times_ms[FIRST] = sum(times_ms.get(stage, 0.0) for stage in arm.first)
            times_ms[TOTAL] = times_ms[FIRST] + times_ms.get("tokens", 0.0)
            if turn >= warmup:
                for stage, ms in times_ms.items():
                    samples[arm.key].setdefault(stage, []).append(ms)
        progress("rounds", turn + 1)
    return run


class _Uncaptured(Exception):
    """A program that was to be captured ran without a graph."""


@contextmanager
def _all_captured(arm: Arm) -> Iterator[None]:
    """Raises _Uncaptured behind what else would be told as the time of graphs."""
    if (pool := arm.pool) is None:
        yield
        return
    before, told = pool.uncaptured, len(pool.fallen_back)
    yield
    if pool.uncaptured > before:
        raise _Uncaptured("; ".join(pool.fallen_back[told:]))


def _why(error: Exception) -> str:
    return f"not captured: {error}" if isinstance(error, _Uncaptured) else "out of memory"


class _peak_mib:
    """Peak of device memory beyond what was held at the start; 0 without a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._result = device, [0.0]

    def __enter__(self) -> list[float]:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        return self._result

    def __exit__(self, *exc: object) -> None:
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
            self._result[0] = (peak - self._before) / 2**20


def rows_of(arms: Sequence[Arm], run: Run) -> list[dict[str, Any]]:
    """One row for each arm: quantiles of its stages, what it costs, and how it compares.

    `times_faster`: medians of the stock unpruned arm at the same batch over its own.
    `agreement`: of a fixed-shape arm with the stock arm that keeps the same tokens.
    `kept`: visual tokens in the last layer. `us_per_token`: microseconds by which the median total
    fell for each of them that went away since the next larger bucket of the same arm. `left_out`:
    why the arm was not timed.
    """
    rows = []
    for arm in arms:
        flops = request_flops(arm)
        row: dict[str, Any] = {
            "arm": arm.name,
            "retain": arm.retain,
            "reducer": None if arm.reducer is None else type(arm.reducer).__name__,
            "batch": arm.batch,
            "visual": arm.visual,
            "kept": arm.layer_tokens[-1],
            "layer_tokens": statistics.fmean(arm.layer_tokens),
            "tflop": {stage: value / 1e12 for stage, value in flops.items()},
            "ms": {s: quantiles(v) for s, v in run.samples.get(arm.key, {}).items()},
            "left_out": run.left_out.get(arm.key),
            "peak_mib": run.peak_mib.get(arm.key),
            "feature_error": run.feature_error.get(arm.key),
        }
        if row["ms"] and run.samples.get("eager"):
            base = {what: quantiles(v)["p50"] for what, v in run.samples["eager"].items()}
            row["times_faster"] = {
                what: base[what] / row["ms"][what]["p50"] for what in (FIRST, TOTAL, HOST)
            }
        twin = arm.key.replace("graph", "eager", 1)
        if twin != arm.key and {twin, arm.key} <= set(run.answers):
            row["agreement"] = agreement(
                run.answers[arm.key], run.answers[twin], run.said[arm.key], run.said[twin]
            )
        rows.append(row)
    for row in rows:
        larger = [r for r in _buckets(rows, row["arm"], row["batch"]) if r["kept"] > row["kept"]]
        if row["ms"] and larger:
            near = min(larger, key=lambda r: int(r["kept"]))
            saved_ms = near["ms"][TOTAL]["p50"] - row["ms"][TOTAL]["p50"]
            row["us_per_token"] = saved_ms * 1e3 / (near["kept"] - row["kept"])
    return rows


def slopes_us(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """For each arm at one request: microseconds of the median total per visual token kept, the
    slope of a line through all its buckets by least squares. The rows are those of `rows_of`."""
    slopes = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        buckets = _buckets(rows, arm, 1)
        if len({row["kept"] for row in buckets}) > 1:
            kept = [row["kept"] for row in buckets]
            total = [row["ms"][TOTAL]["p50"] for row in buckets]
            slopes[arm] = float(np.polyfit(kept, total, 1)[0]) * 1e3
    return slopes


def _buckets(rows: Sequence[dict[str, Any]], arm: str, batch: int) -> list[dict[str, Any]]:
    """Rows of one arm that were timed."""
    return [r for r in rows if (r["arm"], r["batch"]) == (arm, batch) and r["ms"]]


def quantiles(samples_ms: Sequence[float]) -> dict[str, float]:
    """Count, mean and quantiles; each quantile is a sample, the higher one of two."""
    p50, p95, p99 = np.quantile(samples_ms, (0.5, 0.95, 0.99), method="higher").tolist()
    return {
        "n": len(samples_ms),
        "mean": statistics.fmean(samples_ms),
        "min": min(samples_ms),
        "p50": p50,
        "p95": p95,
        "p99": p99,
    }


def agreement(answer: Tensor, other: Tensor, said: Tensor, other_said: Tensor) -> dict[str, float]:
    """Relative error of the first logits or the actions, and the share of equal tokens."""
    error = float((said - other_said).norm() / other_said.norm())
    if answer.is_floating_point():
        return {"relative_error": error}
    return {"equal_tokens": float((answer == other).float().mean()), "relative_error": error}


def card_of(
    subject: Subject, arms: Sequence[Arm], run: Run, device: str, warmup: int, seed: int
) -> LatencyCard:
    """The stages of the fixed-shape arms of one request, by visual tokens that are kept.

    `tokens` is told for one decoded token, `denoise` for one flow step.
    """
    timings = []
    prompt = subject.prompt
    repeats = {"tokens": ("token", prompt.decode), "denoise": ("flow_step", prompt.flow_steps)}
    for arm in {a.layer_tokens[-1]: a for a in arms if a.name == "graph" and a.batch == 1}.values():
        stages = run.samples.get(arm.key, {})
        for stage in ("encode", "reduce", "prefill", "tokens", "denoise", "action_head"):
            if stage in stages:
                name, each = repeats.get(stage, (stage, 1))
                values = [ms / each for ms in stages[stage]]
                timings.append(StageTiming.of(name, arm.layer_tokens[-1], values))
    grid = subject.grid
    return LatencyCard(
        model=f"{subject.name}, {subject.weights} weights",
        device=device,
        threads=torch.get_num_threads(),
        dtype=str(subject.dtype).removeprefix("torch."),
        date=datetime.date.today().isoformat(),
        shapes={
            "grid": (grid.frames, grid.rows, grid.cols),
            "text": (prompt.before, prompt.after),
            "decode": (prompt.decode,),
        },
        warmup=warmup,
        seed=seed,
        timings=tuple(timings),
    )


@torch.inference_mode()
def soak(arms: Sequence[FixedArm], steps: int, seed: int) -> dict[str, Any]:
    """Decode steps with buckets in random order: graphs and memory must not grow.

    arms: fixed-shape arms that share one pool. Returns what was captured and reserved before and
    after, behind a tenth as many steps that warm up; reserved memory is 0 without a GPU.
    """
    pool, subject = arms[0].pool, arms[0].subject
    clock = StageClock(subject.device)
    pixels = [subject.pixels(seed)]
    order = random.Random(seed)

    def decode(count: int) -> int:
        done = 0
        while done < count:
            arm = order.choice(list(arms))
            with arm, clock.request():
                arm.run(clock, pixels)
            done += 1 + subject.prompt.decode
        return done

    def held() -> dict[str, int]:
        on_gpu = subject.device.type == "cuda"
        return {
            "graphs": pool.captured,
            "reserved_bytes": torch.cuda.memory_reserved(subject.device) if on_gpu else 0,
        }

    for arm in arms:
        with arm, clock.request():
            arm.run(clock, pixels)
    decode(steps // 10)
    before, start_s = held(), time.perf_counter()
    done = decode(steps)
    after = held()
    return {
        "steps": done,
        "seconds": time.perf_counter() - start_s,
        "before": before,
        "after": after,
        "grown": after != before,
    }
