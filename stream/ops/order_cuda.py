"""Sorting of short rows as one kernel: a value's rank is how many come before it.

That compares all with all, which a GPU has done before a radix sort has counted its first digit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = 8192
"""Values of a row up to which this is faster."""
DTYPES = (torch.float32, torch.int64, torch.uint8)
POINTS = 8


@triton.jit  # type: ignore[untyped-decorator]
def _key(values, at, n, DOWN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Integers that ascend as the values do, or fall; NaN is the largest value, 0 is -0."""
    key = tl.load(values + at, mask=at < n, other=0)
    if key.dtype.is_floating():
        bits = (key + 0.0).to(tl.int32, bitcast=True)
        key = tl.where(key == key, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    else:
        key = key.to(tl.int64)
    return ~key if DOWN else key


@triton.jit  # type: ignore[untyped-decorator]
def _rank(values, point, n, DOWN: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    own = _key(values, point, n, DOWN)[:, None]
    rank = tl.zeros_like(point)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        other = _key(values, at, n, DOWN)[None, :]
        earlier = at[None, :] < point[:, None]
        before = ((other < own) | ((other == own) & earlier)) & (at < n)[None, :]
        rank += tl.sum(before.to(tl.int32), 1)
    return rank


@triton.jit  # type: ignore[untyped-decorator]
def _ranks(values, ranks, n, DOWN: tl.constexpr, POINTS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * n
    point = tl.program_id(1) * POINTS + tl.arange(0, POINTS)
    tl.store(ranks + row + point, _rank(values + row, point, n, DOWN, BLOCK), mask=point < n)


@triton.jit  # type: ignore[untyped-decorator]
def _ordered(  # type: ignore[no-untyped-def]
    values, ordered, order, n, DOWN: tl.constexpr, POINTS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * n
    point = tl.program_id(1) * POINTS + tl.arange(0, POINTS)
    rank = row + _rank(values + row, point, n, DOWN, BLOCK)
    exists = point < n
    tl.store(ordered + rank, tl.load(values + row + point, mask=exists, other=0), mask=exists)
    tl.store(order + rank, point, mask=exists)


def ranks(x: Tensor) -> Tensor:
    """As `picks.ranks`."""
    x = x.contiguous()
    out = torch.empty_like(x, dtype=torch.long)
    with torch.cuda.device_of(x):
        _ranks[_grid(x)](x, out, x.shape[-1], True, POINTS, _block(x))
    return out


def ordered(x: Tensor, descending: bool) -> tuple[Tensor, Tensor]:
    """As `picks.ordered`."""
    x = x.contiguous()
    values, order = torch.empty_like(x), torch.empty_like(x, dtype=torch.long)
    with torch.cuda.device_of(x):
        _ordered[_grid(x)](x, values, order, x.shape[-1], descending, POINTS, _block(x))
    return values, order


def _grid(x: Tensor) -> tuple[int, int]:
    n = x.shape[-1]
    return x.numel() // n, triton.cdiv(n, POINTS)


def _block(x: Tensor) -> int:
    return min(int(triton.next_power_of_2(x.shape[-1])), 1024)
