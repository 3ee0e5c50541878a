"""DyCoke's first stage: a frame drops what it repeats of an earlier one."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..data import Budget, PatchGrid, VisualTokens
from ..memory import Memory
from ..ops import counts, picks, spread
from ..plan import Plan
from ..signals import Signals
from .base import Reducer

LEVELS = 2
"""Of the published code: every fourth frame stays whole."""


class DyCoke(Reducer):
    """Thins frames to what is least like an earlier frame, patch by patch.

    Every second frame is compared with the one before it, and of the others every second with the
    one before it among them, so every fourth stays whole. Patches are compared at equal places, by
    cosine; nothing is averaged, in spite of the published name (temporal token merging). The
    published code's slips are left out: an odd last frame and the last group of four are treated
    like the others.

    counts: `published` keeps the share 1 - drop of each thinned frame; `exact` shares out what the
        budget leaves beside the whole frames. A budget below a quarter, which the paper cannot
        reach, goes on in the same way: every fourth frame, every eighth, until the whole ones fit.
    drop: share of a thinned frame that is dropped (published counts).
    """

    source: ClassVar[str] = "DyCoke, CVPR 2025, stage before the model"

    counts: Literal["exact", "published"] = "exact"
    drop: float = Field(default=0.7, ge=0, le=1)

    def plan(self, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory) -> Plan:
        self.require_whole_frames(tokens)
        grid = tokens.grid
        share, stride = self._shares(grid, budget.tokens)
        frame = torch.arange(grid.frames)
        lowest_bit = frame & -frame
        before = torch.where(lowest_bit < stride, frame - lowest_bit, frame)
        x = tokens.x.detach().float().view(grid.frames, grid.per_frame, -1)
        new = 1.0 - F.cosine_similarity(x, x[before.to(x.device)], dim=-1)
        new[0] = spread.even(grid.rows, grid.cols, 0.0, x.device)  # compared with nothing
        kept = picks.top_mask(new, share.to(x.device))
        return Plan.keep(picks.top(kept.flatten().byte(), int(share.sum())), tokens.n)

    def _shares(self, grid: PatchGrid, k: int) -> tuple[Tensor, int]:
        """(tokens of each frame, long [t]; the stride of the frames that stay whole)."""
        stride = 2**LEVELS
        whole = torch.full((grid.frames,), grid.per_frame)
        if self.counts == "published":
            thin = torch.arange(grid.frames) % stride != 0
            return whole.masked_fill(thin, int((1 - self.drop) * grid.per_frame)), stride
        while stride < grid.frames and -(-grid.frames // stride) * grid.per_frame > k:
            stride *= 2
        thin = torch.arange(grid.frames) % stride != 0
        left = k - int((~thin).sum()) * grid.per_frame
        if left < 0:
            return counts.evenly(k, grid.frames), stride
        whole[thin] = counts.evenly(left, int(thin.sum()))
        return whole, stride
