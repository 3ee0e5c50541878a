"""A layer of a vision encoder in about half as many kernels, with the layer's own weights.

Queries, keys and values are one product. A sum, the scale of what is added, and the norm that reads
it are one kernel; the bias of a product and a GELU behind it are part of the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersLayer,
    Dinov2WithRegistersSelfAttention,
)
from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipEncoderLayer

from stream.ops.built import built

from .footing import hooked
from .joined import one_product, plain

_GELU, _GELU_TANH = type(ACT2FN["gelu"]), type(ACT2FN["gelu_pytorch_tanh"])


@dataclass(frozen=True, slots=True)
class EncoderParts:
    """What a layer consists of. scales: of what attention and MLP add, each [d], None for 1."""

    norms: tuple[nn.LayerNorm, nn.LayerNorm]
    attention: Any
    projections: Sequence[nn.Module]
    heads: int
    scaling: float
    out: nn.Module
    mlp: nn.Module
    scales: tuple[Tensor | None, Tensor | None] = (None, None)


class Sum(NamedTuple):
    """x + more * scale, not added up yet: x, more [..., d] and scale [d]; without more, x."""

    x: Tensor
    more: Tensor | None = None
    scale: Tensor | None = None

    def total(self) -> Tensor:
        if self.more is None:
            return self.x
        return self.x + (self.more if self.scale is None else self.more * self.scale)

    def normed(self, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """The sum, and its norm."""
        if self.x.is_cuda and (fused := compiled()):
            given = norm.weight, norm.bias, norm.eps
            total, normed = fused.add_norm(self.x, self.more, self.scale, *given)
            return total, normed
        total = self.total()
        return total, F.layer_norm(total, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


class LeanEncoderLayer:
    """Says what a layer says, up to rounding; bfloat16 is rounded less often.

    Attention goes through the function that the model is set to, as transformers does; SDPA stands
    in for eager attention. Hooks on the layer, its norms, its attention or its MLP do not run.
    """

    def __init__(self, parts: EncoderParts) -> None:
        self._parts, self.scaling = parts, parts.scaling
        self._project = one_product(parts.projections)
        self._mlp = _mlp(parts.mlp)

    def __call__(self, x: Tensor) -> Tensor:
        """[b, n, d] -> [b, n, d]."""
        return self.behind(Sum(x)).total()

    def behind(self, before: Sum) -> Sum:
        x, *heads = self.heads(before)
        return self.mixed(Sum(x, self.attended(*heads), self._parts.scales[0]))

    def heads(self, before: Sum) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The sum [..., n, d], and its queries, keys and values [..., heads, n, d / heads]."""
        x, normed = before.normed(self._parts.norms[0])
        query, key, value = (
            part.unflatten(-1, (self._parts.heads, -1)).transpose(-3, -2)
            for part in self._project(normed)
        )
        return x, query, key, value

    def attended(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """What the queries find, [b, n, d]. mask: added to the logits; then it is always SDPA."""
        own, scaling = self._parts.attention, self.scaling
        if mask is None:
            config, functions = own.config, ALL_ATTENTION_FUNCTIONS
            attention = functions.get_interface(config._attn_implementation, functions["sdpa"])
            out, _ = attention(own, query, key, value, None, scaling=scaling, is_causal=False)
        else:
            out = F.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
            out = out.transpose(1, 2)
        found: Tensor = self._parts.out(out.flatten(-2))
        return found

    def mixed(self, before: Sum) -> Sum:
        """The sum, and what the MLP adds."""
        x, normed = before.normed(self._parts.norms[1])
        return Sum(x, self._mlp(normed), self._parts.scales[1])


def lean(layer: nn.Module) -> LeanEncoderLayer | None:
    """The same with fewer kernels; None where its type, or that of its attention or norms, is
    unknown or something is hooked to it."""
    known = _KNOWN.get(type(layer))
    if known is None or any(map(hooked, layer.modules())):
        return None
    taken, attention = known
    parts = taken(layer)
    usual = type(parts.attention) is attention and all(map(usual_norm, parts.norms))
    return LeanEncoderLayer(parts) if usual else None


def usual_norm(norm: Any) -> bool:
    """Whether it is a LayerNorm with weight and bias, to which nothing is hooked."""
    return type(norm) is nn.LayerNorm and norm.bias is not None and not hooked(norm)


def run_layers(layers: Iterable[LeanEncoderLayer], x: Tensor) -> Sum:
    """x [b, n, d] through `layers`."""
    now = Sum(x)
    for layer in layers:
        now = layer.behind(now)
    return now


def siglip(layer: Any) -> EncoderParts:
    own = layer.self_attn
    return EncoderParts(
        norms=(layer.layer_norm1, layer.layer_norm2),
        attention=own,
        projections=[own.q_proj, own.k_proj, own.v_proj],
        heads=own.num_heads,
        scaling=own.scale,
        out=own.out_proj,
        mlp=layer.mlp,
    )


def dinov2(layer: Any) -> EncoderParts:
    own = layer.attention.attention
    return EncoderParts(
        norms=(layer.norm1, layer.norm2),
        attention=own,
        projections=[own.query, own.key, own.value],
        heads=own.num_attention_heads,
        scaling=own.scaling,
        out=layer.attention.output.dense,
        mlp=layer.mlp,
        scales=(layer.layer_scale1.lambda1, layer.layer_scale2.lambda1),
    )


_KNOWN: dict[type[nn.Module], tuple[Callable[[Any], EncoderParts], type[nn.Module]]] = {
    SiglipEncoderLayer: (siglip, SiglipAttention),
    Dinov2WithRegistersLayer: (dinov2, Dinov2WithRegistersSelfAttention),
}


def _mlp(mlp: Any) -> Callable[[Tensor], Tensor]:
    """The MLP; on CUDA its GELU is part of the first product, which computes it by tanh.

    So is an exact GELU of bfloat16: by tanh of the product itself it was 0.17 % off on an H200, and
    0.24 % of the product once that was rounded.
    """
    wide = getattr(mlp, "fc1", None)
    activation = type(getattr(mlp, "activation_fn", None) or getattr(mlp, "activation", None))
    if wide is None or activation not in (_GELU, _GELU_TANH) or not plain([wide]):
        return lambda x: mlp(x)
    by_tanh = activation is _GELU_TANH or wide.weight.dtype == torch.bfloat16
    if not by_tanh or wide.bias is None or not wide.weight.is_cuda:
        return lambda x: mlp(x)

    def fused(x: Tensor) -> Tensor:
        rows = torch._addmm_activation(wide.bias, x.flatten(0, -2), wide.weight.t(), use_gelu=True)
        out: Tensor = mlp.fc2(rows.view(*x.shape[:-1], -1))
        return out

    return fused


@cache
def compiled() -> ModuleType | None:
    """`encoder_cuda`, once it has run."""

    def run() -> ModuleType:
        from . import encoder_cuda

        x = torch.zeros(1, 1, 4, device="cuda")
        encoder_cuda.add_norm(x, x, None, x[0, 0], x[0, 0], 1e-6)
        return encoder_cuda

    return built(run, "Layers of vision encoders add and norm in several launches")
