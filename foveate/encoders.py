"""What encoders that compute less cost in features and answers, on held-out clips."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from policies.models import load
from policies.video.tiny.evaluate import answers_right, rendered_clips
from policies.video.tiny.packed import frame_tokens, pool, visual_positions
from policies.vision.merging import MergingTower
from policies.vision.skipping import SkippingTower

from .quality import points_between

GRID = 14

Encoded = tuple[Tensor, float]
"""Hidden states [f, p, d], and the share of patches that a layer computes, mean over layers."""


@dataclass(slots=True)
class Score:
    """Of one encoder; a value for each clip.

    computed: share of patches a layer computes. error: relative, of the features, mean over frames.
    right, asked: questions, with all tokens.
    """

    computed: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    right: list[int] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        """In percent, over all questions."""
        return 100 * sum(self.right) / sum(self.asked)

    def minus(self, other: Score, seed: int) -> tuple[float, float, float]:
        """(points of accuracy above `other`, low, high at 95 %), paired by clip."""
        gap = np.subtract(self.right, other.right)
        return points_between(gap, np.array(self.asked), seed)


@torch.inference_mode()
def scores(
    settings: list[tuple[float, int]],
    clips: int,
    frames: int,
    device: str,
    seed: int,
    progress: Callable[[str, int], None] = lambda stage, done: None,
) -> dict[str, Score]:
    """Encoder -> score of the model in the box: stock, merging, and skipping by settings.

    settings: (share, refresh) of `SkippingTower`.
    """
    model, _ = load("tiny-video", device, torch.float32)
    tower = model.model.vision_tower
    merging = MergingTower.usual(tower)
    encoders: dict[str, Callable[[Tensor], Encoded]] = {"merge": partial(_merged, merging)}
    for share, refresh in settings:
        skipping = SkippingTower(tower, refresh=refresh, share=share)
        name = f"skip, share {share:g}, refresh {refresh}"
        encoders[name] = partial(_skipped, skipping)
    result = {name: Score() for name in ("exact", *encoders)}
    positions, start = visual_positions(torch.ones(1, frames, device=device), GRID)
    groups = rendered_clips(clips, frames, torch.device(device), videos_per_group=1, seed=seed)
    for done, clip in enumerate(groups, start=1):
        stock = frame_tokens(model, clip.frames).read
        pixels = (clip.frames[0] - 0.5) / 0.5
        seen = {"exact": (stock, 1.0)}
        for name, encode in encoders.items():
            hidden, computed = encode(pixels)
            x = pool(model.model.multi_modal_projector(hidden), GRID)
            seen[name] = (x.flatten(0, 1)[None], computed)
        for name, (x, computed) in seen.items():
            score, real = result[name], clip.type_ids >= 0
            score.computed.append(computed)
            score.error.append(_error(x, stock, frames))
            right = answers_right(model, clip, x, positions, start)
            score.right.append(int(right[real].sum()))
            score.asked.append(int(real.sum()))
        progress("clips", done)
    return result


def _merged(tower: MergingTower, pixels: Tensor) -> Encoded:
    counts = tower.patches()
    return tower(pixels)[0], sum(counts) / len(counts) / counts[0]


def _skipped(tower: SkippingTower, pixels: Tensor) -> Encoded:
    layout = tower.layout(pixels)
    return tower(pixels, layout)[0], tower.computed(layout) / (len(pixels) * tower.patches)


def _error(x: Tensor, stock: Tensor, frames: int) -> float:
    x, stock = x.view(frames, -1), stock.view(frames, -1)
    return float(((x - stock).norm(dim=1) / stock.norm(dim=1)).mean())
