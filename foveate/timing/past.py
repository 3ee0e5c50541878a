"""What the actions of earlier control steps looked at, made up."""

from __future__ import annotations

import torch

from stream.data import PatchGrid
from stream.memory import Memory
from stream.reducers.vla_pruner import remember

AGES_S = (0.2, 0.1)


def two_steps(grid: PatchGrid, generator: torch.Generator, device: torch.device | str) -> Memory:
    """A stream that was at time -AGES_S, now at 0; its attention is random."""
    memory = Memory()
    places = torch.arange(grid.size, device=device)
    for age_s in AGES_S:
        looked = torch.rand(grid.size, generator=generator).to(device)
        remember(memory, looked, places, grid, time_s=-age_s, epoch=0)
    return memory
