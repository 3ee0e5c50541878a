"""A decoder layer of Llama's shape in half as many kernels, with the layer's own weights.

A decode step launches kernels that are far shorter than the pauses between them, so what counts
is their number: queries, keys and values are one product, so are gate and up of the MLP; the
rotation is one kernel, the gate is one, a norm is one together with the sum that it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer

from stream.ops.built import built

from .footing import hooked
from .joined import one_product

KNOWN = (LlamaDecoderLayer, Qwen2DecoderLayer, Qwen2_5_VLDecoderLayer)
FUSED = {type(ACT2FN["silu"]): "silu_gate", type(ACT2FN["gelu_pytorch_tanh"]): "tanh_gelu_gate"}
"""Activations whose gate is one kernel on CUDA, and its name."""


def lean(layer: nn.Module) -> Callable[..., Tensor]:
    """`layer`, or the same with fewer kernels where its type is known and nothing is hooked to it:
    one call fits both."""
    known = type(layer) in KNOWN and getattr(layer.self_attn, "sliding_window", None) is None
    return LeanLayer(layer) if known and not any(map(hooked, layer.modules())) else layer


def run_layers(
    layers: Sequence[Callable[..., Tensor]],
    x: Tensor,
    mask: Tensor | None,
    tables: tuple[Tensor, ...],
    store: Any,
    is_causal: bool,
) -> Tensor:
    """x [b, n, d] through `layers`, lean ones or transformers' own; see `LeanLayer.__call__`."""
    more: Tensor | None = None
    one = next((layer.tables(tables) for layer in layers if isinstance(layer, LeanLayer)), tables)
    for layer in layers:
        if isinstance(layer, LeanLayer):
            x, more = layer.behind(x, more, mask, one, store, is_causal)
            continue
        x = layer(
            x if more is None else x + more,
            attention_mask=mask,
            position_embeddings=tables,
            past_key_values=store,
            use_cache=True,
            is_causal=is_causal,
        )
        more = None
    return x if more is None else x + more


class LeanLayer:
    """Says what `layer`, one of KNOWN, says, up to rounding; bfloat16 is rounded less often.

    Attention goes through the function that the model is set to, as transformers does. Projections
    are joined where they are plain (`joined`), else called as modules. Hooks that come later on the
    layer, its norms, its attention or its MLP do not run.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        own, mlp = layer.self_attn, layer.mlp
        self._norms = (layer.input_layernorm, layer.post_attention_layernorm)
        self._project = one_product([own.q_proj, own.k_proj, own.v_proj])
        self._widen = one_product([mlp.gate_proj, mlp.up_proj])
        fused = compiled() if layer.input_layernorm.weight.is_cuda else None
        self._rotate = fused.rotate if fused else rotate
        self._add_norm = fused.add_norm if fused else add_norm
        self._gate = gate_of(mlp.act_fn, layer.input_layernorm.weight.is_cuda)

    def __call__(
        self,
        x: Tensor,
        *,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, ...],
        past_key_values: Any,
        use_cache: bool = True,
        is_causal: bool = True,
    ) -> Tensor:
        """x [b, n, d] -> [b, n, d]; position_embeddings: cos and sin, [b or 1, n, head] or, with
        several axes of positions, [axes, b, n, head]."""
        tables = self.tables(position_embeddings)
        x, more = self.behind(x, None, attention_mask, tables, past_key_values, is_causal)
        return x + more

    def tables(self, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """cos and sin as one table of positions each, [b or 1, n, head]."""
        if tables[0].ndim < 4:
            return tables
        axes = self._layer.self_attn.config.rope_parameters["mrope_section"]
        return tuple(one_axis(table, axes) for table in tables)

    def behind(
        self,
        x: Tensor,
        more: Tensor | None,
        mask: Tensor | None,
        tables: tuple[Tensor, ...],
        store: Any,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor]:
        """The layer at x + more as (x', more'), so that the next one can sum and norm at once."""
        layer, first, second = self._layer, *self._norms
        if more is None:
            normed = F.rms_norm(x, first.weight.shape, first.weight, first.variance_epsilon)
        else:
            x, normed = self._add_norm(x, more, first.weight, first.variance_epsilon)
        seen = self._attend(normed, mask, is_causal, tables, store)
        x, normed = self._add_norm(x, seen, second.weight, second.variance_epsilon)
        return x, layer.mlp.down_proj(self._gate(*self._widen(normed)))

    def _attend(
        self,
        x: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        tables: tuple[Tensor, ...],
        store: Any,
    ) -> Tensor:
        own = self._layer.self_attn
        heads = (*x.shape[:2], -1, own.head_dim)
        query, key, value = (part.view(heads) for part in self._project(x))
        query, key = self._rotate(query, key, *tables)
        keys, values = store.update(key.transpose(1, 2), value.transpose(1, 2), own.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS[own.config._attn_implementation]
        query = query.transpose(1, 2)
        out, _ = attention(own, query, keys, values, mask, scaling=own.scaling, is_causal=is_causal)
        mixed: Tensor = own.o_proj(out.reshape(*x.shape[:2], -1))
        return mixed


def gate_of(activation: Any, on_cuda: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """(gate, up), both [b, n, d] -> activation(gate) * up."""
    name = FUSED.get(type(activation))
    kernels = compiled() if on_cuda and name else None
    return getattr(kernels, name) if kernels and name else partial(gated, activation)


def gated(function: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return function(gate) * up


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions of query [b, n, h, d] and key [b, n, h_kv, d]; cos, sin [b or 1, n, d].

    Channel i is turned with channel i + d / 2.
    """
    both = torch.cat([query, key], 2)
    first, second = both.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    both = torch.addcmul(both * cos[:, :, None], turned, sin[:, :, None])
    rotated_query, rotated_key = both.split([query.shape[2], key.shape[2]], 2)
    return rotated_query, rotated_key


def add_norm(x: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + more, its root-mean-square norm times weight [d]); both [b, n, d]."""
    total = x + more
    return total, F.rms_norm(total, weight.shape, weight, eps)


def one_axis(table: Tensor, axes: list[int]) -> Tensor:
    """[axes, b, n, d] -> [b, n, d]: of each half of d, axis i gives the next axes[i] channels."""
    parts = table.split(axes * 2, -1)
    return torch.cat([part[i % len(axes)] for i, part in enumerate(parts)], -1)


@cache
def compiled() -> ModuleType | None:
    """`layer_cuda`, once it has run."""

    def run() -> ModuleType:
        from . import layer_cuda

        x = torch.zeros(1, 1, 2, 4, device="cuda")
        layer_cuda.rotate(x, x, x[:, :, 0], x[:, :, 0])
        layer_cuda.silu_gate(x[:, :, 0], x[:, :, 0])
        layer_cuda.tanh_gelu_gate(x[:, :, 0], x[:, :, 0])
        layer_cuda.add_norm(x[:, :, 0], x[:, :, 0], x[0, 0, 0], 1e-6)
        return layer_cuda

    return built(run, "Decoder layers rotate and gate in several launches")
