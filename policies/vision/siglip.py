"""A SigLIP tower taken apart, its layers in fewer kernels, called between the places where patches
leave."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from ..graphs.encoder import LeanEncoderLayer, siglip
from ..graphs.footing import Footing
from ..probes import Attention
from .tower import embedding


class SiglipParts:
    """The embeddings and encoder layers of a SigLIP vision model.

    Hidden states are those after the last layer, before any normalisation behind it.
    """

    def __init__(self, tower: nn.Module) -> None:
        self._tower, self._footing = tower, Footing(lambda: (tower,))
        self._build()

    def now(self) -> Self:
        """The parts of the tower as it is now; ask once for each pass."""
        if not self._footing.holds():
            self._build()
        return self

    def _build(self) -> None:
        inner: Any = getattr(self._tower, "vision_model", self._tower)
        self.embed = embedding(inner.embeddings)
        self.layers = [LeanEncoderLayer(siglip(layer)) for layer in inner.encoder.layers]
        self.patch_px = int(inner.embeddings.patch_size)
        self.patches = int(inner.embeddings.num_patches)
        self._footing.note()  # joined weights have moved


def received(layer: LeanEncoderLayer, query: Tensor, key: Tensor) -> Tensor:
    """Attention each key receives, mean over heads and queries, float32 [f, n]."""
    return Attention(query, key, layer.scaling, None, causal=False).received_from_all()


def spread(x: Tensor, source: Tensor) -> Tensor:
    """x [f, n, ...] -> one row for each of the p patches that `source` (long [f, p]) names."""
    index = source.view(*source.shape, *(1,) * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return torch.gather(x, 1, index)
