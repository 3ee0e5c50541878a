"""Choosing tokens that lie far apart: in feature space, or in the picture."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from .built import built
from .similarity import dots, pairwise_cosine


def farthest(x: Tensor, valid: Tensor, k: int) -> Tensor:
    """Greedy max-min picks on cosine distance, long [b, k], in the order they are picked.

    The first pick lies farthest from its nearest neighbour, each later one farthest from the
    picks so far; ties go to the lowest index and nothing is picked twice. The first m picks are
    the picks for k = m. A group with fewer than k valid points ends in -1.

    x: [b, n, d], a zero vector is at distance 1 from all; valid: bool [b, n].
    All distances are taken once, then a pick costs one row of them and no host synchronisation.
    Source: VLA-Pruner (arXiv 2511.16449), redundancy filter; max-min diversity of DivPrune.
    """
    b, n, _ = x.shape
    if n == 0 or k == 0:
        return torch.full((b, k), -1, device=x.device)
    x = x.detach()
    if kernels := kernels_for(x):
        picks: Tensor = kernels.chain(*kernels.apart(dots(x), valid), min(k, n))
    else:
        distance = 1.0 - pairwise_cosine(x)
        distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        isolation = torch.where(valid[:, None, :], distance, torch.inf).amin(-1)
        picks = chain(distance, isolation.masked_fill_(~valid, -torch.inf), min(k, n))
    return F.pad(picks, (0, k - n), value=-1) if k > n else picks


def chain(distance: Tensor, isolation: Tensor, k: int) -> Tensor:
    """k picks, the first the most isolated, each other farthest from those before, long [b, k].

    distance: float32 [b, n, n]. isolation: float32 [b, n], -inf for what may not be picked. k:
    1..n; where nothing is left, -1 is picked.
    """
    b = distance.shape[0]
    picks = torch.empty(b, k, dtype=torch.long, device=distance.device)
    allowed = isolation > -torch.inf
    nearest = torch.where(allowed, torch.inf, -torch.inf)
    chosen = isolation.argmax(-1, keepdim=True)
    for rank in range(k):
        picks[:, rank : rank + 1] = chosen
        row = torch.take_along_dim(distance, chosen[..., None], 1)[:, 0]
        torch.minimum(nearest, row, out=nearest)
        nearest.scatter_(1, chosen, -torch.inf)
        chosen = nearest.argmax(-1, keepdim=True)
    spent = torch.arange(k, device=distance.device) >= allowed.sum(-1, keepdim=True)
    return picks.masked_fill_(spent, -1)


def kernels_for(x: Tensor) -> ModuleType | None:
    """`spread_cuda`, where it can take groups as large as those of x [b, n, ...]."""
    module = _compiled() if x.is_cuda else None
    return module if module is not None and x.shape[1] <= module.LARGEST else None


@cache
def _compiled() -> ModuleType | None:
    """`spread_cuda`, once it has run."""

    def run() -> ModuleType:
        from . import spread_cuda

        dot = torch.zeros(1, 2, 2, device="cuda")
        spread_cuda.chain(*spread_cuda.apart(dot, dot[:, 0] == 0), 2)
        return spread_cuda

    return built(run, "Farthest picks are launched one by one")


def even(rows: int, cols: int, phase: float, device: torch.device | str = "cpu") -> Tensor:
    """A score for every patch whose top k are spread evenly for every k, float64 [rows * cols].

    A rank-1 lattice with the two-dimensional golden ratio as its step: no stride of the grid
    divides it, so no row or column is favoured. Another phase gives another, equally even set.
    """
    golden = 1.324717957244746
    row = torch.arange(rows, dtype=torch.float64, device=device)[:, None]
    col = torch.arange(cols, dtype=torch.float64, device=device)
    return ((row / golden + col / golden**2 + phase) % 1.0).flatten()
