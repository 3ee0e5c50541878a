"""Patches as coloured boxes: what a plan did to each, painted over a frame. No text, no layout."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..data import PatchGrid
from ..plan import Plan

Ints = NDArray[np.int64]
Pixels = NDArray[np.uint8]

DROPPED = -1
ALONE = -2


@dataclass(frozen=True, slots=True)
class Fates:
    """What became of each patch.

    paint: int64 [frames, rows, cols], the output row of a merged patch, else DROPPED or ALONE.
    owner: int64 [frames, rows, cols], the output row of any surviving patch, else DROPPED.
    anchor: int64 [frames, rows, cols], the merged output row that sits at the patch, else DROPPED.
    tokens: int64 [frames], output tokens that sit in each frame.
    merged_rows: output tokens that hold more than their own patch.
    """

    paint: Ints
    owner: Ints
    anchor: Ints
    tokens: Ints
    merged_rows: int

    @classmethod
    def of(cls, plan: Plan, grid: PatchGrid) -> Fates:
        plan = plan.to("cpu")
        shape = (grid.frames, grid.rows, grid.cols)
        row, col, weight = (t.numpy() for t in plan.entries())
        sits: Ints = plan.anchor.numpy()
        row, col = row[weight != 0], col[weight != 0]
        shared = np.bincount(row, minlength=plan.k) > 1
        shared |= np.bincount(row, weights=col != sits[row], minlength=plan.k) > 0
        owner: Ints = plan.owner().numpy()
        rows = np.append(np.where(shared, np.arange(plan.k), ALONE), DROPPED)
        anchor = np.full(grid.size, DROPPED)
        anchor[sits[shared]] = np.flatnonzero(shared)
        return cls(
            paint=rows[owner].reshape(shape),
            owner=owner.reshape(shape),
            anchor=anchor.reshape(shape),
            tokens=np.bincount(sits // grid.per_frame, minlength=grid.frames),
            merged_rows=int(shared.sum()),
        )


def hues_of(count: int) -> Pixels:
    """uint8 [count, 3]: bright colours; neighbours in the list are far apart on the wheel."""
    step = np.arange(count)
    hue = step * 0.618034 % 1 * 6
    channel = np.abs((hue[:, None] + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1
    pale = np.array([0.0, 0.35])[step // 3 % 2][:, None]
    light = np.clip(channel, 0, 1) * (1 - pale) + pale
    return np.asarray((55 + 200 * light).round(), dtype=np.uint8)


def _edge(label: Ints, thick: int) -> NDArray[np.bool_]:
    """Pixels of [height, width] that lie within `thick` of another label or the border."""
    padded = np.pad(label, thick, constant_values=np.iinfo(np.int64).min)
    high, wide = label.shape
    edge = np.zeros(label.shape, dtype=np.bool_)
    for step in range(1, thick + 1):
        for y, x in ((-step, 0), (step, 0), (0, -step), (0, step)):
            edge |= padded[thick + y : thick + y + high, thick + x : thick + x + wide] != label
    return edge


def paint_frame(image: Pixels, t: int, fates: Fates, cell: tuple[int, int]) -> Pixels:
    """One frame with its patches' fates on it: uint8 [rows * cell height, cols * cell width, 3]."""
    wide, high = cell

    def upsample(label: Ints) -> Ints:
        return label.repeat(high, axis=0).repeat(wide, axis=1)

    paint, owner, anchor = (upsample(a[t]) for a in (fates.paint, fates.owner, fates.anchor))
    size = (paint.shape[1], paint.shape[0])
    bright = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC), np.float32)
    luma = bright @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    hues = hues_of(int(max(paint.max(), anchor.max(), 0)) + 1).astype(np.float32)
    dropped, merged = paint == DROPPED, paint >= 0

    out = np.where(dropped[..., None], (26 + 0.24 * luma)[..., None], bright)
    out[merged] = 0.7 * out[merged] + 0.3 * hues[paint[merged]]
    thin = _edge(owner, 1)
    lone = thin & (paint == ALONE)
    out[lone] = 0.35 * out[lone] + 0.65 * 255
    out[thin & merged] = hues[paint[thin & merged]]
    patch = upsample(np.arange(fates.paint[t].size).reshape(fates.paint[t].shape))
    thick = _edge(patch, int(np.clip(min(cell) // 6, 2, 6))) & (anchor >= 0)
    out[thick] = hues[anchor[thick]]
    return np.asarray(out.clip(0, 255).round(), dtype=np.uint8)
