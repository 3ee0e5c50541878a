"""Choosing tokens that lie far apart: in feature space, or in the picture."""

from __future__ import annotations

import torch
from torch import Tensor

from .similarity import cosine


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
    picks = torch.full((b, k), -1, device=x.device)
    if n == 0 or k == 0:
        return picks
    points = x.detach().float()
    distance = 1.0 - cosine(points, points)
    itself = torch.eye(n, dtype=torch.bool, device=x.device)
    isolation = distance.masked_fill(itself | ~valid[:, None, :], torch.inf).amin(-1)
    chosen = isolation.masked_fill(~valid, -torch.inf).argmax(-1, keepdim=True)
    distance.masked_fill_(itself | ~valid[:, None, :], -torch.inf)
    nearest = torch.full((b, n), torch.inf, device=x.device)
    for rank in range(min(k, n)):
        picks[:, rank : rank + 1] = chosen
        torch.minimum(
            nearest, torch.take_along_dim(distance, chosen[..., None], 1)[:, 0], out=nearest
        )
        chosen = nearest.argmax(-1, keepdim=True)
    spent = torch.arange(k, device=x.device) >= valid.sum(-1, keepdim=True)
    return picks.masked_fill(spent, -1)


def even(rows: int, cols: int, phase: float, device: torch.device | str = "cpu") -> Tensor:
    """A score for every patch whose top k are spread evenly for every k, float64 [rows * cols].

    A rank-1 lattice with the two-dimensional golden ratio as its step: no stride of the grid
    divides it, so no row or column is favoured. Another phase gives another, equally even set.
    """
    golden = 1.324717957244746
    row = torch.arange(rows, dtype=torch.float64, device=device)[:, None]
    col = torch.arange(cols, dtype=torch.float64, device=device)
    return ((row / golden + col / golden**2 + phase) % 1.0).flatten()
