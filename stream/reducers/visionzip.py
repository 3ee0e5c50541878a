"""VisionZip: the salient tokens of each frame, and averages of what is left."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from ..data import Budget, VisualTokens
from ..memory import Memory
from ..ops import counts, merges, picks, similarity
from ..plan import Plan
from ..signals import Signal, Signals
from .base import Reducer


class VisionZip(Reducer):
    """Dominant tokens by attention; the rest is added to evenly spaced others of its frame.

    The paper's encoder has a class token, whose attention chooses and which is kept; here it is
    the attention that patches receive. It compares the encoder's keys; here it is the features.

    dominant: share of a frame's tokens that attention chooses (the paper's 54 of 64).
    merge: `sum` adds the mean of what was assigned to a token to the token itself, as published,
        which about doubles it; `mean` averages token and assigned.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.SALIENCY})
    source: ClassVar[str] = "VisionZip, CVPR 2025"

    dominant: float = Field(default=54 / 64, ge=0, le=1)
    merge: Literal["sum", "mean"] = "sum"

    def plan(self, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory) -> Plan:
        self.require_whole_frames(tokens)
        frames, patches = tokens.grid.frames, tokens.grid.per_frame
        device = tokens.x.device
        x = tokens.x.detach().float().view(frames, patches, -1)
        share = counts.evenly(budget.tokens, frames).to(device)
        salient = (share * self.dominant).round().long()
        context = (share - salient)[:, None]
        chosen = picks.top_mask(signals[Signal.SALIENCY].view(frames, patches), salient)
        rank = (~chosen).cumsum(1) - 1
        step = ((patches - salient)[:, None] // context.clamp_min(1)).clamp_min(1)
        target = ~chosen & (rank % step == 0) & (rank // step < context)
        alike = similarity.cosine(x, x).masked_fill(~target[:, None], -torch.inf)
        owner = F.one_hot(alike.argmax(-1), patches).mT  # [t, to, from]
        kept = chosen | target
        given = owner * (~kept & (context > 0))[:, None]
        joined = given.sum(-1, keepdim=True)
        itself = torch.diag_embed(torch.ones_like(rank))
        if self.merge == "mean":
            weight = (itself + given) / (joined + 1)
        else:
            weight = itself + given / joined.clamp_min(1)
        return Plan.merge(*merges.entries_by_frame(kept, weight), tokens.n)
