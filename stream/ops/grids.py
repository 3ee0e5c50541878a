"""Patch grids: pooling, and where separator embeddings go."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import PatchGrid

NewlineLayout = Literal["one_token", "grid"]


def pool_map(score: Tensor, rows: int, cols: int, out_rows: int, out_cols: int) -> Tensor:
    """Bilinear pooling of one value for each patch: [t, rows*cols] -> [t, out_rows*out_cols].

    The same operator that LLaVA-OneVision applies to features, so scores stay aligned.
    """
    grid = score.view(score.shape[0], 1, rows, cols)
    return F.interpolate(grid, size=(out_rows, out_cols), mode="bilinear").flatten(1)


def pool_features(x: Tensor, rows: int, cols: int, out_rows: int, out_cols: int) -> Tensor:
    """Bilinear pooling of features: [t, rows*cols, d] -> [t, out_rows*out_cols, d].

    LLaVA-OneVision's operator on channels that stay side by side, which gives the same values.
    """
    grid = x.unflatten(1, (rows, cols)).permute(0, 3, 1, 2)
    pooled = F.interpolate(grid, size=(out_rows, out_cols), mode="bilinear")
    return pooled.permute(0, 2, 3, 1).flatten(1, 2)


def newline_slots(anchor: Tensor, grid: PatchGrid, layout: NewlineLayout) -> Tensor:
    """Where newline embeddings go among the tokens of a reduced video, long [m], ascending.

    A value s says: a newline follows the first s tokens. `one_token` closes the video;
    `grid` follows every grid row of every frame that still has a token.

    anchor: long [k], flat (t, y, x) index of each token, ascending for `grid`.
    """
    if layout == "one_token":
        return torch.tensor([anchor.numel()], device=anchor.device)
    line = anchor // grid.cols
    ends = torch.ones(anchor.shape, dtype=torch.bool, device=anchor.device)
    ends[:-1] = line[1:] != line[:-1]
    return ends.nonzero().squeeze(-1) + 1


def insert_rows(x: Tensor, slots: Tensor, row: Tensor) -> Tensor:
    """x [k, d] with `row` [d] inserted after the first s tokens for every s in `slots`."""
    m, k = slots.numel(), x.shape[0]
    at = slots + torch.arange(m, device=slots.device)
    out = x.new_empty(k + m, x.shape[1])
    old = torch.ones(k + m, dtype=torch.bool, device=x.device).index_fill_(0, at, False)
    out[old] = x
    out[at] = row
    return out
