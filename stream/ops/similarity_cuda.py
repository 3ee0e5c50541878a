"""Similarity of adjacent frames in one pass over the features as they are."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512


@triton.jit  # type: ignore[untyped-decorator]
def _adjacent(x, alike, patches, channels, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64)
    before = x + place * channels
    after = x + (place + patches) * channels
    dot = tl.zeros((BLOCK,), tl.float32)
    square = tl.zeros((BLOCK,), tl.float32)
    later = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, channels, BLOCK):
        at = start + tl.arange(0, BLOCK)
        a = tl.load(before + at, mask=at < channels, other=0.0).to(tl.float32)
        b = tl.load(after + at, mask=at < channels, other=0.0).to(tl.float32)
        dot += a * b
        square += a * a
        later += b * b
    norm = tl.maximum(tl.sqrt(tl.sum(square, 0)), 1e-8)
    norm *= tl.maximum(tl.sqrt(tl.sum(later, 0)), 1e-8)
    tl.store(alike + place, tl.sum(dot, 0) / norm)


def adjacent_cosine(x: Tensor) -> Tensor:
    """As `similarity.adjacent_cosine`, of two frames or more."""
    t, p, c = x.shape
    x = x.contiguous()
    alike = torch.empty(t - 1, p, device=x.device)
    with torch.cuda.device_of(x):
        _adjacent[(alike.numel(),)](x, alike, p, c, BLOCK)
    return alike
