"""Choosing tokens: which indices fit a count."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .built import built


def ordered(x: Tensor, descending: bool = False) -> tuple[Tensor, Tensor]:
    """(values in order, where each was, long), row by row; of equal ones the lower index first.

    x: [..., n].
    """
    if kernels := _kernels_for(x):
        values: Tensor
        order: Tensor
        values, order = kernels.ordered(x, descending)
        return values, order
    made = torch.sort(x, dim=-1, descending=descending, stable=True)
    return made.values, made.indices


def ranks(score: Tensor) -> Tensor:
    """Place of each score in the falling order of its row, long [..., n]; ties as in `ordered`."""
    if kernels := _kernels_for(score):
        counted: Tensor = kernels.ranks(score)
        return counted
    order = ordered(score, descending=True)[1]
    place = torch.arange(score.shape[-1], device=score.device)
    return torch.empty_like(order).scatter_(-1, order, place.expand_as(order))


def best(score: Tensor, k: int) -> Tensor:
    """Indices of the k largest scores, the largest first, long [..., min(k, n)]; ties go to lower
    indices. score: [..., n]."""
    return ordered(score, descending=True)[1][..., :k]


def top(score: Tensor, k: int) -> Tensor:
    """The same in ascending order."""
    return best(score, k).sort(dim=-1).values


def top_mask(score: Tensor, k: Tensor) -> Tensor:
    """Row-wise `top` with a count of its own for each row, bool [..., n].

    score: [..., n]; k: long [...], or what broadcasts to it.
    """
    return ranks(score) < k[..., None]


def top_places(score: Tensor, pick: Tensor, base: Tensor) -> Tensor:
    """Chosen ranks of each row, of equal scores the lower index first: base + index, long [k].

    score: [r, n]; pick: long [k], places in the rows sorted by falling score and laid end to end;
    base: long [k]. Unlike `top_mask` and `places` it needs no mask of all n.
    """
    return ordered(score, descending=True)[1].view(-1)[pick] + base


def places(mask: Tensor, count: int) -> Tensor:
    """Ascending indices where `mask` (bool [n]) is true, long [count].

    count: how many there are; the caller knows, so the device need not be asked.
    """
    n = mask.numel()
    slot = torch.where(mask, mask.cumsum(0) - 1, count)
    out = torch.zeros(count + 1, dtype=torch.long, device=mask.device)
    return out.scatter_(0, slot, torch.arange(n, device=mask.device))[:count]


def spaced(n: int, k: int) -> Tensor:
    """k distinct indices evenly spaced over 0..n-1 (the middle of each of k equal parts)."""
    return ((torch.arange(k, dtype=torch.float64) + 0.5) * (n / max(k, 1))).long()


def staggered(frames: int, per_frame: int, k: int) -> Tensor:
    """k distinct indices spread over all frames, each frame at a phase of its own.

    Without the phase an even stride that divides `per_frame` would sample the same patches in
    every frame. The phase walks by the golden ratio, which no stride divides.
    """
    frame = torch.arange(frames, dtype=torch.float64)
    base, extra = divmod(k, frames)
    count = torch.full((frames,), base)
    count[spaced(frames, extra)] += 1
    frame_of = torch.repeat_interleave(torch.arange(frames), count)
    first = count.cumsum(0) - count
    rank = torch.arange(k) - first[frame_of]
    phase = (0.5 + frame * 0.6180339887498949) % 1.0
    within = (rank + phase[frame_of]) * per_frame / count[frame_of]
    return frame_of * per_frame + within.long().clamp_(max=per_frame - 1)


def _kernels_for(x: Tensor) -> ModuleType | None:
    """`order_cuda`, where it can take rows as long as those of x [..., n]."""
    module = _compiled() if x.is_cuda and x.numel() else None
    fits = module is not None and x.shape[-1] <= module.LARGEST and x.dtype in module.DTYPES
    return module if fits else None


@cache
def _compiled() -> ModuleType | None:
    """`order_cuda`, once it has run."""

    def run() -> ModuleType:
        from . import order_cuda

        row = torch.zeros(2, device="cuda")
        order_cuda.ordered(row, descending=True)
        order_cuda.ranks(row)
        return order_cuda

    return built(run, "Rows are sorted in several launches")
