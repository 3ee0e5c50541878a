"""Bipartite soft matching, as ToMe merges tokens, on what is about to enter the language model."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..data import Budget, VisualTokens
from ..memory import Memory
from ..ops import similarity
from ..plan import Plan
from ..signals import Signals
from .base import Reducer


class ToMe(Reducer):
    """Averages the most similar pairs of tokens, in rounds.

    In a round each token at an even place finds its most similar one at an odd place, and the most
    similar pairs merge, weighted by the patches that they stand for. ToMe does this inside the
    vision encoder, on its keys, a few tokens a layer. Here it is done on the features, over all
    frames together, in as many rounds as the budget asks for; a round at most halves the tokens.
    """

    source: ClassVar[str] = "arXiv 2210.09461, matching on features before the model"

    def plan(self, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory) -> Plan:
        x = tokens.x.detach().float()
        plan = Plan.identity(tokens.n, x.device)
        size = torch.ones(tokens.n, device=x.device)
        while plan.k > budget.tokens:
            step = matched(plan.apply(x), size, min(plan.k // 2, plan.k - budget.tokens))
            row, col, _ = step.entries()
            size = torch.zeros(step.k, device=x.device).index_add_(0, row, size[col])
            plan = step @ plan
        return plan


def matched(x: Tensor, size: Tensor, merges: int) -> Plan:
    """One round: the `merges` tokens at even places that have the most similar token at an odd
    place are averaged into it, weighted by size; ties go to lower places.

    x: float32 [n, d]; size: float32 [n], patches that a token stands for.
    """
    n, device = x.shape[0], x.device
    best, to = similarity.cosine(x[::2], x[1::2]).max(-1)
    source = torch.sort(best, descending=True, stable=True).indices[:merges]
    target = torch.arange(n, device=device)
    target[2 * source] = 2 * to[source] + 1
    stays = torch.ones(n, dtype=torch.bool, device=device).index_fill_(0, 2 * source, False)
    anchor = torch.sort(stays.byte(), descending=True, stable=True).indices[: n - merges]
    row = (stays.cumsum(0) - 1)[target]
    total = torch.zeros(n - merges, device=device).index_add_(0, row, size)
    return Plan.merge(anchor, row, torch.arange(n, device=device), size / total[row], n)
