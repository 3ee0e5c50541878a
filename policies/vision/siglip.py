"""A SigLIP tower taken apart: its own submodules, called between the places where patches leave."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..probes import Attention


class SiglipParts:
    """The embeddings and encoder layers of a SigLIP vision model.

    Hidden states are those after the last layer, before any normalisation behind it.
    """

    def __init__(self, tower: nn.Module) -> None:
        inner: Any = getattr(tower, "vision_model", tower)
        self._embed = inner.embeddings
        self.layers: list[Any] = list(inner.encoder.layers)
        self.patch_px = int(self._embed.patch_size)
        self.patches = int(self._embed.num_patches)

    def embed(self, pixels: Tensor) -> Tensor:
        """[f, 3, h, w] -> [f, p, d], row after row in memory."""
        embedded: Tensor = self._embed(pixels)
        return embedded.contiguous()

    def heads(self, layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [..., heads, n, d / heads] of x [..., n, d]."""
        own, normed = layer.self_attn, layer.layer_norm1(x)
        q, k, v = (
            project(normed).unflatten(-1, (own.num_heads, -1)).transpose(-3, -2)
            for project in (own.q_proj, own.k_proj, own.v_proj)
        )
        return q, k, v

    def attended(
        self, layer: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """x plus what its queries find. mask: added to the logits."""
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=layer.self_attn.scale)
        out: Tensor = x + layer.self_attn.out_proj(found.transpose(-3, -2).flatten(-2))
        return out

    def mixed(self, layer: Any, x: Tensor) -> Tensor:
        """x plus its MLP."""
        out: Tensor = x + layer.mlp(layer.layer_norm2(x))
        return out


def received(layer: Any, query: Tensor, key: Tensor) -> Tensor:
    """Attention each key receives, mean over heads and queries, float32 [f, n]."""
    return Attention(query, key, layer.self_attn.scale, None, causal=False).received_from_all()


def spread(x: Tensor, source: Tensor) -> Tensor:
    """x [f, n, ...] -> one row for each of the p patches that `source` (long [f, p]) names."""
    index = source.view(*source.shape, *(1,) * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return torch.gather(x, 1, index)
