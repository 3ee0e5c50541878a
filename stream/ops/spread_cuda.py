"""The chain of farthest picks as one kernel: a pick costs a memory access, not four launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = 8192
"""Points of a group up to which their distances to the picks stay in registers."""


@triton.jit  # type: ignore[untyped-decorator]
def _chain(distance, isolation, picks, n, k, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    group = tl.program_id(0).to(tl.int64)
    point = tl.arange(0, BLOCK)
    exists = point < n
    alone = tl.load(isolation + group * n + point, mask=exists, other=float("-inf"))
    nearest = tl.where(alone > float("-inf"), float("inf"), float("-inf"))
    most, chosen = tl.max(alone, 0, return_indices=True)
    for rank in range(k):
        tl.store(picks + group * k + rank, tl.where(most > float("-inf"), chosen, -1))
        row = distance + (group * n + chosen) * n
        nearest = tl.minimum(nearest, tl.load(row + point, mask=exists, other=float("-inf")))
        nearest = tl.where(point == chosen, float("-inf"), nearest)
        most, chosen = tl.max(nearest, 0, return_indices=True)


def chain(distance: Tensor, isolation: Tensor, k: int) -> Tensor:
    """As `spread.chain`, of at most LARGEST points a group."""
    groups, n, _ = distance.shape
    picks = torch.empty(groups, k, dtype=torch.long, device=distance.device)
    block = max(triton.next_power_of_2(n), 32)
    warps = min(max(block // 256, 1), 16)
    with torch.cuda.device_of(distance):
        _chain[(groups,)](
            distance.contiguous(), isolation.contiguous(), picks, n, k, block, num_warps=warps
        )
    return picks
