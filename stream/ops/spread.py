"""Choosing tokens that lie far apart: in feature space, or in the picture."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from .built import built
from .similarity import pairwise_cosine


def farthest(x: Tensor, valid: Tensor, k: int) -> Tensor:
    """Greedy max-min picks on cosine distance, long [b, k], in the order they are picked.

    The first pick lies farthest from its nearest neighbour, each later one farthest from the
    picks so far; ties go to the lowest index and nothing is picked twice. The first m picks are
    the picks for k = m. A group with fewer than k valid points ends in -1.

    x: [b, n, d], a zero vector is at distance 1 from all; valid: bool [b, n].
    All distances are taken once, then a pick costs one row of them and no host synchronisation. A
    point's distance to itself counts as -inf, so what was picked is never the farthest again.
    Source: VLA-Pruner (arXiv 2511.16449), redundancy filter; max-min diversity of DivPrune.
    """
    b, n, _ = x.shape
    if n == 0 or k == 0:
        return torch.full((b, k), -1, device=x.device)
    distance = 1.0 - pairwise_cosine(x.detach())
    itself = torch.eye(n, dtype=torch.bool, device=x.device)
    barred = itself | ~valid[:, None, :]
    isolation = distance.masked_fill(barred, torch.inf).amin(-1)
    first = isolation.masked_fill(~valid, -torch.inf).argmax(-1)
    distance.masked_fill_(barred, -torch.inf)
    one_kernel = _one_kernel(n) if distance.is_cuda else None
    picks = (one_kernel or chain)(distance, first, min(k, n))
    spent = torch.arange(picks.shape[1], device=x.device) >= valid.sum(-1, keepdim=True)
    return F.pad(picks.masked_fill(spent, -1), (0, k - picks.shape[1]), value=-1)


def chain(distance: Tensor, first: Tensor, k: int) -> Tensor:
    """`first` and k - 1 more picks, each farthest from those before it, long [b, k].

    distance: float32 [b, n, n], -inf from a point to itself and to what may not be picked; where
    nothing is left, 0 is picked. first: long [b]; k: 1..n.
    """
    b, n, _ = distance.shape
    picks = torch.empty(b, k, dtype=torch.long, device=distance.device)
    nearest = torch.full((b, n), torch.inf, device=distance.device)
    chosen = first[:, None]
    for rank in range(k):
        picks[:, rank : rank + 1] = chosen
        torch.minimum(
            nearest, torch.take_along_dim(distance, chosen[..., None], 1)[:, 0], out=nearest
        )
        chosen = nearest.argmax(-1, keepdim=True)
    return picks


def _one_kernel(n: int) -> Callable[[Tensor, Tensor, int], Tensor] | None:
    """`chain` as one CUDA kernel, if there is one for groups of n points."""
    module = _compiled()
    return module.chain if module is not None and n <= module.LARGEST else None


@cache
def _compiled() -> ModuleType | None:
    """`spread_cuda`, once it has run."""

    def run() -> ModuleType:
        from . import spread_cuda

        distance = torch.zeros(1, 2, 2, device="cuda")
        spread_cuda.chain(distance, torch.zeros(1, device="cuda").long(), 2)
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
