"""The encoders that compute less, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from .merging import MergingTower
from .skipping import SkippingTower

Encoder = Literal["exact", "merge", "skip"]
"""`exact`: the model's own. `merge`: patches that are alike are merged inside. `skip`: patches
that did not change since a key frame are not encoded again."""

Lean = Callable[[Tensor, bool], tuple[Tensor, ...]]
"""(pixels [f, 3, h, w], saliency asked for) -> hidden states [f, p, d], received attention [f, p]
if asked for."""


def lean_tower(tower: nn.Module, encoder: Encoder) -> Lean | None:
    """What runs in place of a SigLIP tower; None for `exact`."""
    if encoder == "merge":
        return MergingTower.usual(tower)
    if encoder == "skip":
        skipping = SkippingTower(tower)
        return lambda pixels, saliency: skipping(pixels, skipping.layout(pixels), saliency)
    return None
