"""PruMerge: salient tokens that take up what is like them, and one token for the rest."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..data import Budget, VisualTokens
from ..memory import Memory
from ..ops import counts, merges, picks, similarity
from ..plan import Plan
from ..signals import Signal, Signals
from .base import Reducer


class PruMerge(Reducer):
    """Each frame keeps its most attended tokens; each adds its nearest ones, weighted by attention.

    One more token of each frame that keeps two or more is the attention-weighted sum of all that
    were not kept; it stands where the most attended of them stood.

    The paper reads class-token attention, keys and a count from the outliers of attention; here it
    is the attention that patches receive, scaled to 1 in a frame, features, and the budget.

    neighbours: tokens, kept or not, that are added to each kept one.
    spaced: share of a frame's kept tokens that are evenly spaced instead (PruMerge+: about 0.75).
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.SALIENCY})
    source: ClassVar[str] = "LLaVA-PruMerge, ICCV 2025"

    neighbours: int = Field(default=32, ge=0)
    spaced: float = Field(default=0.0, ge=0, le=1)

    def plan(self, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory) -> Plan:
        self.require_whole_frames(tokens)
        frames, patches = tokens.grid.frames, tokens.grid.per_frame
        device = tokens.x.device
        x = tokens.x.detach().float().view(frames, patches, -1)
        saliency = signals[Signal.SALIENCY].view(frames, patches).clamp_min(1e-12)
        attention = saliency / saliency.sum(1, keepdim=True)
        share = counts.evenly(budget.tokens, frames).to(device)
        has_rest = (share > 1).long()
        kept = self._kept(attention, share - has_rest)
        rest = picks.top_mask(attention.masked_fill(kept, -torch.inf), has_rest)

        alike = similarity.cosine(x, x)
        alike.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        nearest = torch.sort(alike, dim=-1, descending=True, stable=True).indices
        near = torch.zeros_like(alike, dtype=torch.bool)
        near.scatter_(-1, nearest[..., : min(self.neighbours, patches - 1)], True)
        takes = torch.where(rest[..., None], ~kept[:, None], near)
        weight = takes * attention[:, None] + torch.diag_embed(kept.float())
        return Plan.merge(*merges.entries_by_frame(kept | rest, weight), tokens.n)

    def _kept(self, attention: Tensor, share: Tensor) -> Tensor:
        """bool [t, p]: `share` tokens of each frame, by attention and evenly spaced."""
        spaced = (share * self.spaced).round().long()
        salient = picks.top_mask(attention, share - spaced)
        rank = (~salient).cumsum(1) - 1
        free = (~salient).sum(1, keepdim=True).clamp_min(1)
        part, next_part = (r * spaced[:, None] // free for r in (rank, rank + 1))
        return salient | (~salient & (part < next_part))
