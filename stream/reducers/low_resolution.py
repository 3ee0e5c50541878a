"""What a coarser picture would give: patches averaged over larger cells."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from ..data import Budget, PatchGrid, VisualTokens
from ..memory import Memory
from ..ops import counts, picks
from ..plan import Plan
from ..signals import Signals
from .base import Reducer


class LowResolution(Reducer):
    """Average pooling of each frame's patch grid to as many cells as the budget allows.

    All frames (or cameras) get the same number of cells, give or take one. Cells are as square as
    an exact count lets them be: rows of cells of equal height, with column counts that differ by
    at most one. It pools what the encoder saw; a smaller picture would also cost the encoder less
    and give it fewer pixels to see with.
    """

    source: ClassVar[str] = "baseline"

    def plan(self, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory) -> Plan:
        self.require_whole_frames(tokens)
        cell, is_centre = cells(tokens.grid, budget.tokens)
        inside = (cell >= 0).nonzero().squeeze(-1)
        row = cell[inside]
        weight = 1.0 / torch.bincount(row, minlength=budget.tokens)[row]
        anchor = picks.top(is_centre.byte(), budget.tokens)
        return Plan.merge(anchor, row, inside, weight, tokens.n).to(tokens.x.device)


def cells(grid: PatchGrid, k: int) -> tuple[Tensor, Tensor]:
    """(cell of every patch, long [n], -1 in a frame without any; bool [n], middle of its cell).

    k cells, at most one for each patch, numbered in (t, y, x) order.
    """
    share = counts.evenly(k, grid.frames)
    lines = torch.tensor([_lines(grid, c) for c in share.tolist()])[:, None, None]
    first = (share.cumsum(0) - share)[:, None, None]
    share = share[:, None, None]
    y, x = torch.arange(grid.rows)[:, None], torch.arange(grid.cols)
    line, middle_y = _part(y, grid.rows, lines)
    before = line * share // lines
    across = ((line + 1) * share // lines - before).clamp_min(1)
    column, middle_x = _part(x, grid.cols, across)
    cell = torch.where(share > 0, first + before + column, -1)
    return cell.flatten(), ((cell >= 0) & (y == middle_y) & (x == middle_x)).flatten()


def _lines(grid: PatchGrid, k: int) -> int:
    """Rows of cells, so that k cells are as square as they can be."""
    square = round(math.sqrt(k * grid.rows / grid.cols))
    return max(1, math.ceil(k / grid.cols), min(square, grid.rows, k))


def _part(place: Tensor, length: int, parts: Tensor) -> tuple[Tensor, Tensor]:
    """(which of the equal parts of 0..length-1 a place lies in, the middle place of that part)."""
    part = place * parts // length
    start, stop = (-(-edge * length // parts) for edge in (part, part + 1))
    return part, (start + stop - 1) // 2
