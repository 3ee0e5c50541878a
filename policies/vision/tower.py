"""A vision tower in fewer kernels: SigLIP, or DINOv2 with registers, with its own weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersEmbeddings,
    Dinov2WithRegistersPatchEmbeddings,
)
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

from ..graphs.encoder import LeanEncoderLayer, lean, run_layers, usual_norm
from ..graphs.footing import hooked
from ..products import linear

States = Callable[[Tensor], Tensor]
"""Pixels [m, 3, h, w] -> hidden states [m, n, d] behind the last norm."""


class LeanTower:
    """Says what a tower says, up to rounding. Hooks that come later on parts of it do not run."""

    def __init__(self, tower: Any, layers: list[LeanEncoderLayer]) -> None:
        self.layers, self.embed = layers, embedding(tower.embeddings)
        self._norm = _last_norm(tower)

    @classmethod
    def of(cls, tower: nn.Module) -> LeanTower | None:
        """None where its kind is unknown or something is hooked to it."""
        inner: Any = getattr(tower, "vision_model", tower)
        if type(getattr(inner, "embeddings", None)) not in _EMBED:
            return None
        own = getattr(inner.encoder, "layers", None) or inner.encoder.layer
        layers = [made for layer in own if (made := lean(layer)) is not None]
        around = any(map(hooked, (tower, inner, inner.encoder)))
        if around or len(layers) < len(own) or not usual_norm(_last_norm(inner)):
            return None
        return cls(inner, layers)

    def __call__(self, pixels: Tensor) -> Tensor:
        """See `States`."""
        return run_layers(self.layers, self.embed(pixels)).normed(self._norm)[1]

    def hidden(self, pixels: Tensor, depth: int) -> Tensor:
        """Hidden states [m, n, d] behind so many layers."""
        return run_layers(self.layers[:depth], self.embed(pixels)).total()


def _last_norm(inner: Any) -> Any:
    return getattr(inner, "post_layernorm", None) or inner.layernorm


def states(tower: Any) -> States:
    """`tower(pixels).last_hidden_state`, in fewer kernels where that can be."""

    def stock(pixels: Tensor) -> Tensor:
        hidden: Tensor = tower(pixels).last_hidden_state
        return hidden

    return LeanTower.of(tower) or stock


def patch_rows(convolution: nn.Conv2d, pixels: Tensor) -> Tensor:
    """A convolution whose steps are as wide as its kernel, as one product: [m, patches, d]."""
    (height, width), weight = convolution.kernel_size, convolution.weight
    rows, columns = pixels.shape[-2] // height, pixels.shape[-1] // width
    squares = pixels[..., : rows * height, : columns * width].to(weight.dtype)
    squares = squares.unflatten(-1, (columns, width)).unflatten(-3, (rows, height))
    flat = squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return linear(flat, weight.flatten(1), convolution.bias)


def embedding(own: nn.Module) -> States:
    """What enters the first layer, [m, n, d], row after row in memory; as the module itself says it
    where its type is unknown or something is hooked to it."""
    embed = _EMBED.get(type(own))
    usual = all(type(part) in _EMBED_PARTS for part in own.modules() if part is not own)
    if embed and usual and not any(map(hooked, own.modules())):
        return partial(embed, own)
    return lambda pixels: own(pixels).contiguous()


def _siglip(own: Any, pixels: Tensor) -> Tensor:
    embedded: Tensor = patch_rows(own.patch_embedding, pixels) + own.position_embedding.weight
    return embedded


def _dinov2(own: Any, pixels: Tensor) -> Tensor:
    """The class token, registers, which have no position, and patches."""
    side = own.patch_embeddings.patch_size[0]
    count = own.position_embeddings.shape[1] - 1
    rows, columns = (pixels.shape[axis] // side for axis in (-2, -1))
    if rows * columns != count or rows != columns:
        embedded: Tensor = own(pixels)
        return embedded.contiguous()
    first, places = own.position_embeddings.split([1, count], 1)
    patches = patch_rows(own.patch_embeddings.projection, pixels) + places
    begin = torch.cat([own.cls_token + first, own.register_tokens], 1)
    return torch.cat([begin.expand(len(patches), -1, -1), patches], 1)


_EMBED: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
    SiglipVisionEmbeddings: _siglip,
    Dinov2WithRegistersEmbeddings: _dinov2,
}
_EMBED_PARTS = (nn.Conv2d, nn.Embedding, nn.Dropout, Dinov2WithRegistersPatchEmbeddings)
