"""Weights of a merge: what each token gives to the row it is merged into."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

MergeRule = Literal["beta", "mean"]


def cluster_weights(owner: Tensor, rule: MergeRule, beta: float) -> Tensor:
    """Weight of every token in its cluster, float32 [n].

    beta: the centre gives `beta`, the others share 1 - beta; a centre alone gives 1.
    mean: centre and others give equal shares.

    owner: long [n], the index of each token's centre; a centre owns itself.
    """
    size = torch.zeros_like(owner).index_add_(0, owner, torch.ones_like(owner))[owner]
    if rule == "mean":
        return size.reciprocal()
    is_centre = owner == torch.arange(owner.numel(), device=owner.device)
    other = (1.0 - beta) / (size - 1).clamp_min_(1)
    return other.masked_fill_(is_centre, beta).masked_fill_(size == 1, 1.0)


def halving_weights(slot: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Closed form of folding sources one by one as target = (target + source) / 2.

    slot: long [m], the target of each source, sources in folding order; k: number of targets.
    Returns (weight of each source [m], weight each target keeps of itself [k]): with m sources
    the target keeps 2^-m and source j (0-based) gives 2^-(m-j).
    Source: HoliTom's inner merge (arXiv 2505.21334).
    """
    count = torch.zeros(k, dtype=torch.long, device=slot.device)
    count.index_add_(0, slot, torch.ones_like(slot))
    order = torch.argsort(slot, stable=True)
    first = count.cumsum(0) - count
    rank = torch.empty_like(slot)
    rank[order] = torch.arange(slot.numel(), device=slot.device) - first[slot[order]]
    return torch.exp2(-(count[slot] - rank).float()), torch.exp2(-count.float())


def entries_by_frame(kept: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(anchor, row, col, weight) of a plan that merges inside frames.

    kept: bool [t, p], tokens that lend their place to a row; weight: float [t, p, p], what each
    of them takes from each token of its frame (other rows are not read).
    """
    frames, patches = kept.shape
    anchor = kept.flatten().nonzero().squeeze(-1)
    row_at = (kept.flatten().cumsum(0) - 1).view(frames, patches)
    frame, to, taken = ((weight != 0) & kept[..., None]).nonzero(as_tuple=True)
    return anchor, row_at[frame, to], frame * patches + taken, weight[frame, to, taken]
