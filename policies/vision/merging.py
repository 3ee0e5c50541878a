"""Merging alike patches inside the encoder, and giving every patch its row back at the end.

Source: ToMe, arXiv 2210.09461: bipartite matching on keys, sizes, proportional attention.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stream.errors import ConfigError

from ..graphs.encoder import Sum
from .siglip import SiglipParts, received, spread


class MergingTower:
    """A SigLIP tower that merges patches after the attention of some layers.

    merges: layer -> share of the patches that are merged away there, at most a half.
    """

    def __init__(self, tower: nn.Module, merges: Mapping[int, float]) -> None:
        self._parts = SiglipParts(tower)
        depth = len(self._parts.layers)
        wrong = {k: v for k, v in merges.items() if not (0 <= k < depth and 0 <= v <= 0.5)}
        if wrong:
            raise ConfigError(
                f"Merges {wrong} do not fit; layers are 0..{depth - 1} and at most 0.5 of the "
                "patches are merged in one of them."
            )
        self._merges = dict(merges)

    @classmethod
    def usual(cls, tower: nn.Module) -> MergingTower:
        """A third of the patches leaves after a quarter of the layers, another after the half."""
        depth = len(SiglipParts(tower).layers)
        return cls(tower, {depth // 4: 1 / 3, depth // 2: 1 / 3})

    def patches(self) -> list[int]:
        """Patches of a frame that enter each layer."""
        counts, now = [], self._parts.patches
        for layer in range(len(self._parts.layers)):
            counts.append(now)
            now -= int(self._merges.get(layer, 0.0) * now)
        return counts

    def __call__(self, pixels: Tensor, saliency: bool = False) -> tuple[Tensor, ...]:
        """[f, 3, h, w] -> (hidden states [f, p, d],), and received attention [f, p] if asked."""
        parts = self._parts.now()
        x = parts.embed(pixels)
        now = Sum(x)
        size = torch.ones(x.shape[:2], device=x.device)
        source = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        score = None
        for index, layer in enumerate(parts.layers):
            x, q, k, v = layer.heads(now)
            merged = x.shape[1] < source.shape[1]
            mask = size.log().to(x.dtype)[:, None, None] if merged else None
            if saliency and index == len(parts.layers) - 1:
                score = spread(received(layer, q, k) / size, source)
            now = Sum(x, layer.attended(q, k, v, mask))
            if gone := int(self._merges.get(index, 0.0) * x.shape[1]):
                x, size, slot = merge(now.total(), k.mean(1), size, gone)
                now, source = Sum(x), slot.gather(1, source)
            now = layer.mixed(now)
        hidden = spread(now.total(), source)
        return (hidden,) if score is None else (hidden, score)


def merge(x: Tensor, metric: Tensor, size: Tensor, gone: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the `gone` even places that are most like an odd one into it.

    x: [f, n, d]; metric: [f, n, c], compared by cosine; size: float32 [f, n], patches each stands
    for. Returns what is left (even places first), its sizes, and long [f, n], where each went.
    """
    metric = F.normalize(metric.float(), dim=-1)
    alike, partner = (metric[:, ::2] @ metric[:, 1::2].mT).max(-1)
    order = torch.sort(alike, dim=-1, descending=True, stable=True).indices
    source, stays = order[:, :gone], order[:, gone:].sort(-1).values
    target = partner.gather(1, source)

    weighted = x * size[..., None].to(x.dtype)
    even, odd = weighted[:, ::2], weighted[:, 1::2]
    total = size[:, 1::2].scatter_add(1, target, size[:, ::2].gather(1, source))
    wide = target[..., None].expand(-1, -1, x.shape[-1])
    odd = odd.scatter_add(1, wide, spread(even, source)) / total[..., None].to(x.dtype)
    left = torch.cat([spread(x[:, ::2], stays), odd], 1)
    sizes = torch.cat([size[:, ::2].gather(1, stays), total], 1)

    kept = stays.shape[1]
    slot = torch.empty(x.shape[:2], dtype=torch.long, device=x.device)
    rank = torch.arange(kept, device=x.device).expand_as(stays)
    slot[:, ::2] = torch.zeros_like(order).scatter(1, stays, rank).scatter(1, source, target + kept)
    slot[:, 1::2] = kept + torch.arange(odd.shape[1], device=x.device)
    return left, sizes, slot
