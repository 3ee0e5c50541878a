"""Time and memory of the reduction itself, on synthetic features."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stream.data import Budget, PatchGrid, VisualTokens
from stream.memory import Memory
from stream.reducers.base import reduce_stage
from stream.reducers.holitom import HoliTom
from stream.signals import Signal, Signals
from stream.sources.survey import rss_mib

SCENE_FRAMES = 8
MOVING_SHARE = 0.25


def synthetic_features(
    frames: int, patches: int, channels: int, seed: int, dtype: torch.dtype, device: str
) -> Tensor:
    """[frames * patches, channels]: scenes of still patches with a little noise, some moving."""
    generator = torch.Generator().manual_seed(seed)
    scenes = -(-frames // SCENE_FRAMES)
    still = torch.randn(scenes, patches, channels, generator=generator)
    still = still.repeat_interleave(SCENE_FRAMES, 0)[:frames]
    noise = torch.randn(frames, patches, channels, generator=generator)
    moving = torch.rand(frames, patches, 1, generator=generator) < MOVING_SHARE
    x = torch.where(moving, noise, still + 0.2 * noise)
    return x.view(-1, channels).to(device, dtype)


@torch.inference_mode()
def merge_cost(
    frames: int,
    grid_side: int,
    channels: int,
    retain: float,
    repeats: int,
    seed: int,
    dtype: torch.dtype,
    device: str,
) -> dict[str, Any]:
    """HoliTom's whole stage before the model: similarity to merged tokens.

    Median and quartiles in milliseconds, and the extra memory at its peak as a multiple of the
    input's size.
    """
    grid = PatchGrid(frames, grid_side, grid_side)
    x = synthetic_features(frames, grid.per_frame, channels, seed, dtype, device)
    saliency = torch.rand(grid.size, generator=torch.Generator().manual_seed(seed)).to(device)
    tokens = VisualTokens.full(x, grid, tuple(float(t) for t in range(frames)))
    method, budget = HoliTom(), Budget.ratio(retain, of=grid.size)

    def stage() -> Tensor:
        signals = Signals({Signal.SALIENCY: saliency})
        return reduce_stage(method, tokens, signals, budget, Memory()).apply(x)

    input_mib = x.numel() * x.element_size() / 2**20
    stage()
    peak_mib = extra_memory_mib(stage, device)
    times = sorted(timed_ms(stage, device) for _ in range(repeats))
    quarter = statistics.quantiles(times, n=4)
    return {
        "frames": frames,
        "patches": grid.per_frame,
        "channels": channels,
        "retain": retain,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "threads": torch.get_num_threads(),
        "tokens_out": stage().shape[0],
        "median_ms": quarter[1],
        "q25_ms": quarter[0],
        "q75_ms": quarter[2],
        "min_ms": times[0],
        "input_mib": input_mib,
        "extra_mib": peak_mib,
        "extra_over_input": peak_mib / input_mib,
        "repeats": repeats,
        "seed": seed,
    }


def timed_ms(work: Callable[[], Any], device: str) -> float:
    """Host time of one call, the device drained before and after."""
    _drain(device)
    start = time.perf_counter()
    work()
    _drain(device)
    return (time.perf_counter() - start) * 1e3


def _drain(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def extra_memory_mib(work: Callable[[], Any], device: str) -> float:
    """Peak memory of one call beyond what was held before: allocated on a GPU, else resident."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    stop = threading.Event()
    before_mib = highest = rss_mib()

    def watch() -> None:
        nonlocal highest
        while not stop.wait(0.0005):
            highest = max(highest, rss_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    stop.set()
    watcher.join()
    return highest - before_mib
