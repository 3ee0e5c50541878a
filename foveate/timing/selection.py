"""What VLA-Pruner's selection costs, alone: launched as it stands and captured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from policies.graphs.capture import GraphPool, Program
from stream.data import Budget, PatchGrid, VisualTokens
from stream.reducers.vla_pruner import VLAPruner
from stream.signals import Signal, Signals

from .clock import HOST, StageClock
from .measure import quantiles
from .past import two_steps


@torch.inference_mode()
def selection_cost(
    cameras: int, retain: float, repeats: int, seed: int, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """Quantiles in ms of one selection among `cameras` x 256 tokens of 4096 channels, with what
    two past steps looked at."""
    generator = torch.Generator().manual_seed(seed)
    grid = PatchGrid(cameras, 16, 16)
    x = torch.randn(grid.size, 4096, generator=generator).to(device, dtype)
    score = torch.rand(grid.size, generator=generator).to(device)
    memory, reducer = two_steps(grid, generator, device), VLAPruner()
    budget = Budget.ratio(retain, of=grid.size)

    def select(x: Tensor, score: Tensor) -> tuple[Tensor]:
        tokens = VisualTokens.full(x, grid, (0.0,) * cameras)
        given = {Signal.TEXT_ROWS: score, Signal.INPUT_EMBEDDINGS: x}
        return (reducer.plan(tokens, Signals(given), budget, memory).anchor,)

    clock = StageClock(torch.device(device))
    result: dict[str, Any] = {
        "tokens": grid.size,
        "kept": budget.tokens,
        "cameras": cameras,
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": repeats,
        "seed": seed,
    }
    for name, enabled in (("eager", False), ("graph", True)):
        program = Program(GraphPool(device, enabled), "VLA-Pruner's selection", select)
        samples: list[float] = []
        for turn in range(repeats + 3):
            with clock.request() as times_ms, clock.stage("select"):
                program(x, score)
            if turn >= 3:
                samples.append(times_ms["select"])
        result[name] = quantiles(samples) | {HOST: times_ms[HOST]}
    return result
