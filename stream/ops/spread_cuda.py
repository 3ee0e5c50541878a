"""Farthest picks as two kernels: the distances, then the chain, whose every pick costs a memory
access instead of four launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = 8192
"""Points of a group up to which their distances to the picks stay in registers."""


@triton.jit  # type: ignore[untyped-decorator]
def _apart(dot, valid, distance, isolation, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at, point = tl.program_id(0).to(tl.int64) * n, tl.program_id(1)
    other = tl.arange(0, BLOCK)
    exists = other < n
    square = tl.load(dot + (at + other) * n + other, mask=exists, other=0.0)
    norm = tl.maximum(tl.sqrt_rn(square), 1e-8)
    own = tl.maximum(tl.sqrt_rn(tl.load(dot + (at + point) * n + point)), 1e-8)
    row = (at + point) * n + other
    far = 1.0 - tl.div_rn(tl.load(dot + row, mask=exists, other=0.0), own * norm)
    far = tl.where(other == point, float("inf"), far)
    tl.store(distance + row, far, mask=exists)
    there = tl.load(valid + at + other, mask=exists, other=0) != 0
    alone = tl.min(tl.where(there, far, float("inf")), 0)
    here = tl.load(valid + at + point) != 0
    tl.store(isolation + at + point, tl.where(here, alone, float("-inf")))


@triton.jit
def _bits(x):  # type: ignore[no-untyped-def]
    """Integers that ascend as float32 does: of these a warp finds the largest in one step."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit  # type: ignore[untyped-decorator]
def _chain(distance, isolation, picks, n, k, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    MOST: tl.constexpr = 0x7F800000  # inf
    LEAST: tl.constexpr = -0x7F800001  # -inf
    group = tl.program_id(0).to(tl.int64)
    point = tl.arange(0, BLOCK)
    exists = point < n
    alone = _bits(tl.load(isolation + group * n + point, mask=exists, other=float("-inf")))
    nearest = tl.where(alone > LEAST, MOST, LEAST)
    most = tl.max(alone, 0)
    chosen = tl.min(tl.where(alone == most, point, BLOCK), 0)
    for rank in range(k):
        tl.store(picks + group * k + rank, tl.where(most > LEAST, chosen, -1))
        row = distance + (group * n + chosen) * n
        near = _bits(tl.load(row + point, mask=exists, other=float("-inf")))
        nearest = tl.where(point == chosen, LEAST, tl.minimum(nearest, near))
        most = tl.max(nearest, 0)
        chosen = tl.min(tl.where(nearest == most, point, BLOCK), 0)


def apart(dot: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """(distance, isolation) as `spread.chain` takes them, of dot products float32 [b, n, n] and
    which points count (bool [b, n])."""
    groups, n, _ = dot.shape
    valid = valid.contiguous()
    distance, isolation = torch.empty_like(dot), torch.empty_like(dot[:, 0])
    block = _block(n)
    with torch.cuda.device_of(dot):
        _apart[(groups, n)](dot, valid, distance, isolation, n, block, num_warps=_warps(block))
    return distance, isolation


def chain(distance: Tensor, isolation: Tensor, k: int) -> Tensor:
    """As `spread.chain`, of at most LARGEST points a group."""
    groups, n, _ = distance.shape
    picks = torch.empty(groups, k, dtype=torch.long, device=distance.device)
    block = _block(n)
    with torch.cuda.device_of(distance):
        _chain[(groups,)](
            distance.contiguous(),
            isolation.contiguous(),
            picks,
            n,
            k,
            block,
            num_warps=_warps(block),
        )
    return picks


def _block(n: int) -> int:
    return max(int(triton.next_power_of_2(n)), 32)


def _warps(block: int) -> int:
    return min(max(block // 256, 1), 16)
