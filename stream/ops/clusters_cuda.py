"""DPC-KNN in one kernel a step: the many small operators of it cost more launches than work.

A program takes one point of a group and the row of its distances.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = 2048
"""Points of a group up to which a row of distances stays in registers."""


@triton.jit  # type: ignore[untyped-decorator]
def _distances(dot, distance, n, channels, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    group, point = tl.program_id(0).to(tl.int64) * n * n, tl.program_id(1)
    other = tl.arange(0, BLOCK)
    exists = other < n
    row = group + point * n + other
    square = tl.load(dot + group + other * (n + 1), mask=exists, other=0.0)
    both = tl.load(dot + group + point * (n + 1)) + square
    apart = tl.maximum(both - 2.0 * tl.load(dot + row, mask=exists, other=0.0), 0.0)
    apart = tl.where(other == point, 0.0, apart)
    tl.store(distance + row, tl.sqrt(apart / channels), mask=exists)


@triton.jit  # type: ignore[untyped-decorator]
def _crowd(distance, neighbours, valid, rho, largest, n, most, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    group, point = tl.program_id(0).to(tl.int64), tl.program_id(1)
    other = tl.arange(0, BLOCK)
    exists = other < n
    at = group * n
    here = tl.load(valid + at + point) != 0
    pair = here & (tl.load(valid + at + other, mask=exists, other=0) != 0)
    row = tl.load(distance + (at + point) * n + other, mask=exists, other=0.0)
    tl.store(largest + at + point, tl.max(tl.where(pair, row, 0.0), 0))
    wanted = tl.load(neighbours + group)
    left = tl.where(pair, row, float("inf"))
    total = 0.0
    for rank in range(most):
        near, which = tl.min(left, 0, return_indices=True)
        total += tl.where(rank < wanted, near * near, 0.0)
        left = tl.where(other == which, float("inf"), left)
    tl.store(rho + at + point, tl.exp(-total / wanted))


@triton.jit  # type: ignore[untyped-decorator]
def _peak(distance, valid, rho, largest, boost, score, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    group, point = tl.program_id(0).to(tl.int64), tl.program_id(1)
    other = tl.arange(0, BLOCK)
    exists = other < n
    at = group * n
    here = tl.load(valid + at + point) != 0
    there = tl.load(valid + at + other, mask=exists, other=0) != 0
    own = tl.load(rho + at + point)
    denser = there & (tl.load(rho + at + other, mask=exists, other=0.0) > own)
    far = tl.max(tl.load(largest + at + other, mask=exists, other=0.0), 0)
    row = tl.load(distance + (at + point) * n + other, mask=exists, other=0.0)
    delta = tl.min(tl.where(denser, row, far), 0)
    peak = own * delta
    if boost is not None:
        peak *= tl.load(boost + at + point)
    tl.store(score + at + point, tl.where(here, peak, float("-inf")))


@triton.jit  # type: ignore[untyped-decorator]
def _assign(distance, centre, owner, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    group, point = tl.program_id(0).to(tl.int64), tl.program_id(1)
    other = tl.arange(0, BLOCK)
    exists = other < n
    at = group * n
    chosen = tl.load(centre + at + other, mask=exists, other=0) != 0
    row = tl.load(distance + (at + point) * n + other, mask=exists, other=0.0)
    nearest = tl.argmin(tl.where(chosen, row, float("inf")), 0)
    itself = tl.load(centre + at + point) != 0
    tl.store(owner + at + point, at + tl.where(itself, point, nearest))


@triton.jit  # type: ignore[untyped-decorator]
def _weights(owner, times, weight, n, beta, MEAN: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    group, point = tl.program_id(0).to(tl.int64), tl.program_id(1)
    other = tl.arange(0, BLOCK)
    at = group * n
    exists = tl.load(times + at + other, mask=other < n, other=0) > 0
    mine = tl.load(owner + at + point)
    same = exists & (tl.load(owner + at + other, mask=exists, other=-1) == mine)
    size = tl.sum(same.to(tl.int32), 0).to(tl.float32)
    if MEAN:
        share = 1.0 / size
    else:
        centre = tl.where(size > 1, beta, 1.0)
        share = tl.where(mine == at + point, centre, (1.0 - beta) / tl.maximum(size - 1, 1.0))
    stands_for = tl.maximum(tl.load(times + at + point), 1).to(tl.float32)
    tl.store(weight + at + point, share / stands_for)


def distances(dot: Tensor, channels: int) -> Tensor:
    """As `similarity.distances`, of dot products float32 [b, n, n] of points with `channels`."""
    b, n, _ = dot.shape
    out = torch.empty_like(dot)
    with torch.cuda.device_of(dot):
        _distances[(b, n)](dot, out, n, channels, _block(n))
    return out


def density_peak_score(
    distance: Tensor, neighbours: Tensor, valid: Tensor, boost: Tensor | None, most: int
) -> Tensor:
    """As `clusters.density_peak_score`."""
    b, n, _ = distance.shape
    distance, valid = distance.contiguous(), valid.contiguous()
    boost = None if boost is None else boost.contiguous()
    rho, largest, score = torch.empty(3, b, n, device=distance.device)
    with torch.cuda.device_of(distance):
        _crowd[(b, n)](distance, neighbours, valid, rho, largest, n, min(most, n), _block(n))
        _peak[(b, n)](distance, valid, rho, largest, boost, score, n, _block(n))
    return score


def assign(distance: Tensor, centre: Tensor) -> Tensor:
    """As `clusters.assign`."""
    b, n, _ = distance.shape
    owner = torch.empty(b, n, dtype=torch.long, device=distance.device)
    with torch.cuda.device_of(distance):
        _assign[(b, n)](distance.contiguous(), centre.contiguous(), owner, n, _block(n))
    return owner


def weights(owner: Tensor, times: Tensor, mean: bool, beta: float) -> Tensor:
    """As `clusters.weights`."""
    b, n = owner.shape
    weight = torch.empty(b, n, device=owner.device)
    with torch.cuda.device_of(owner):
        _weights[(b, n)](owner, times.contiguous(), weight, n, beta, mean, _block(n))
    return weight


def _block(n: int) -> int:
    return int(triton.next_power_of_2(n))
