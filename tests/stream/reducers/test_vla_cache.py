"""What VLA-Cache computes anew, by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from stream.data import Budget, PatchGrid, VisualTokens
from stream.memory import Memory
from stream.plan import Plan
from stream.reducers.base import reduce_stage
from stream.reducers.vla_cache import VLACache
from stream.reducers.vla_pruner import remember
from stream.signals import Signals

GRID = PatchGrid(2, 1, 4)
"""Two cameras of four patches."""


def turned(x: Tensor, which: dict[int, float]) -> Tensor:
    """Token i turned by an angle; its cosine to before is cos(angle)."""
    out = x.clone()
    for i, angle in which.items():
        at = torch.tensor(angle)
        out[i] = torch.stack([torch.cos(at), torch.sin(at)])
    return out


def tick(x: Tensor, k: int, memory: Memory, reducer: VLACache | None = None) -> Plan:
    tokens = VisualTokens.full(x, GRID, (0.0, 0.0))
    plan = reduce_stage(reducer or VLACache(), tokens, Signals({}), Budget(k), memory)
    memory.tick += 1
    return plan


def flat() -> Tensor:
    return torch.tensor([[1.0, 0.0]]).repeat(8, 1)


def test_all_are_computed_at_first_then_those_that_changed_most() -> None:
    memory, x = Memory(), flat()
    assert tick(x, 3, memory).k == 8
    x = turned(x, {1: 0.1, 4: 0.5, 6: 0.3, 7: 0.2})
    assert tick(x, 3, memory).anchor.tolist() == [4, 6, 7]


def test_slow_drift_adds_up_until_it_is_computed() -> None:
    """Patch 2 turns by little in every tick, the others jump once; it is not forgotten."""
    memory, x = Memory(), flat()
    tick(x, 1, memory)
    seen = []
    for step in range(1, 6):
        x = turned(x, {2: 0.1 * step, step + 2: 0.25})
        seen += tick(x, 1, memory).anchor.tolist()
    assert seen == [3, 4, 2, 5, 6]
    tick(x, 1, memory)
    unchanged = memory.state["vla_cache"]
    assert float((unchanged - x).abs().max()) > 0.1  # patch 7, not yet computed anew


def test_what_the_actions_looked_at_is_always_computed() -> None:
    memory, x = Memory(), flat()
    tick(x, 4, memory)
    looked = torch.tensor([0.0, 0, 0, 0.4, 0, 0.6, 0, 0])
    remember(memory, looked, torch.arange(8), GRID, time_s=0.0, epoch=0)
    x = turned(x, {1: 0.1, 6: 0.3, 7: 0.2})
    assert tick(x, 4, memory).anchor.tolist() == [3, 5, 6, 7]
    x = turned(x, {0: 0.3, 1: 0.4, 2: 0.5, 4: 0.6})
    assert tick(x, 4, memory, VLACache(relevant=0)).anchor.tolist() == [0, 1, 2, 4]


def test_streams_begin_anew_after_a_reset_and_with_another_grid() -> None:
    memory = Memory()
    assert not VLACache().is_ready(memory)
    tick(flat(), 2, memory)
    assert VLACache().is_ready(memory)
    assert tick(flat(), 2, memory).k == 2
    memory.reset()
    assert not VLACache().is_ready(memory)
    assert tick(flat(), 2, memory).k == 8
    one = VisualTokens.full(flat()[:4], PatchGrid(1, 1, 4), (0.0,))
    assert reduce_stage(VLACache(), one, Signals({}), Budget(2), memory).k == 4
