"""Parts of lerobot's policies in fewer kernels, with their own weights and up to rounding.

The kernels of a flow step of 50 actions are so short that their number counts, also when they are
replayed. Norms and rotations become one each, attention becomes two products and what lies between
them; of the 53 kernels of a layer of pi0's prefix 30 are left.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma.modeling_gemma import GemmaAttention, GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from stream.ops.built import built

from ..graphs import layer as plain
from .flow import bound, instead


@contextmanager
def lean_parts(network: nn.Module) -> Iterator[None]:
    """While open, norms, MLPs and attention of known types in `network` run in fewer kernels.

    Hooks on them run as ever; others, and those with another forward than their library's, are left
    as they stand. Projections are not joined: lerobot does not save policies whose weights are
    views.
    """
    from lerobot.policies.pi_gemma import PiGemmaRMSNorm

    known: dict[type[nn.Module], Callable[[Any], Callable[..., Any]]] = {
        GemmaAttention: _attention,
        GemmaMLP: _mlp,
        LlamaMLP: _mlp,
        LlamaRMSNorm: _llama_norm,
        PiGemmaRMSNorm: _gemma_norm,
    }
    if "eager" in ALL_ATTENTION_FUNCTIONS:  # somebody's own, which lerobot would run
        known.pop(GemmaAttention)
    with ExitStack() as stack:
        for module in network.modules():
            kind = type(module)
            make = known.get(kind)
            if make and is_of(kind.__module__, module.forward):
                stack.enter_context(bound(module, "forward", partial(instead, make(module))))
        yield


@contextmanager
def at_once(towers: Any, pictures: Sequence[Tensor]) -> Iterator[None]:
    """While open, `towers.embed_image` runs once for all of `pictures` that are alike, instead of
    once for each: one picture leaves most of a GPU idle."""
    said: dict[int, Tensor] = {}

    def together(embed: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def embedded(picture: Tensor) -> Tensor:
            if all(picture is not each for each in pictures):
                return embed(picture)
            if id(picture) not in said:
                kind = picture.shape, picture.dtype
                alike = [each for each in pictures if (each.shape, each.dtype) == kind]
                parts = embed(torch.cat(alike)).split(len(picture))
                said.update(zip(map(id, alike), parts, strict=True))
            return said[id(picture)]

        return embedded

    with bound(towers, "embed_image", together):
        yield


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """(what is seen [b, n, h * d], attention as `attention` gives it, of the type of the values).

    query: [b, n, h, d]; key, value: [b, h_kv, m, d]; mask: [b, 1, n, m], bool (True = may look) or
    added to the logits.
    """
    b, n, heads, d = query.shape
    held = key.shape[1]
    weights = attention(query, key, mask, scaling).to(value.dtype)
    seen = (weights @ value).view(b, held, n, -1, d).transpose(1, 2).reshape(b, n, heads * d)
    return seen, weights


def attention(query: Tensor, key: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """[b, h_kv, n * g, m]: what each of the g heads that share keys pays to them, row by row; of
    the type of the query. The others are as in `attend`."""
    b, n, heads, d = query.shape
    groups = heads // key.shape[1]
    rows = query.view(b, n, -1, groups, d).transpose(1, 2).reshape(b, key.shape[1], -1, d)
    kernels: Any = compiled_or_plain(query)
    weights: Tensor = kernels.masked_softmax(rows @ key.mT, mask, scaling, groups)
    return weights


def masked_softmax(logits: Tensor, mask: Tensor, scaling: float, groups: int) -> Tensor:
    """softmax of logits [b, h_kv, n * groups, m] times `scaling`, float32 inside.

    mask: [b, 1, n, m] as in `attend`. Rows that may see nothing look everywhere alike.
    """
    x: Tensor = logits.float().unflatten(2, (-1, groups)) * scaling
    mask = mask[:, :, :, None]
    lowest = torch.finfo(x.dtype).min
    x = x.masked_fill(~mask, lowest) if mask.dtype == torch.bool else x + mask
    return x.softmax(-1).to(logits.dtype).flatten(2, 3)


def norm(
    x: Tensor, scale: Tensor, shift: Tensor | None, one: float, eps: float, kind: torch.dtype
) -> Tensor:
    """x [b, n, d] over its root mean square, times (scale + one), plus shift; float32 inside.

    scale, shift: [d], or [b, d] with a value for each sequence. kind: dtype of the result.
    """
    whole = x.float()
    normed = whole * torch.rsqrt(whole.square().mean(-1, keepdim=True) + eps)
    normed = normed * (one + scale.float().unsqueeze(-2))
    return (normed if shift is None else normed + shift.float().unsqueeze(-2)).to(kind)


def rope(x: Tensor, positions: Tensor, timescale: Tensor) -> Tensor:
    """x [b, n, h, d] turned by positions long [b, n] over timescale float32 [d / 2]: channel i
    with channel i + d / 2."""
    radians = (positions[..., None].float() / timescale)[:, :, None]
    first, second = x.float().chunk(2, -1)
    sin, cos = radians.sin(), radians.cos()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def is_of(library: str, function: Any) -> bool:
    """Whether a function or method is one of a module's own, so that ours may take its place."""
    return getattr(function, "__module__", None) == library


def compiled_or_plain(x: Tensor) -> Any:
    """The module whose `masked_softmax`, `norm` and `rope` fit a tensor."""
    return (compiled() if x.is_cuda else None) or sys.modules[__name__]


def _attention(own: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        heads = (*hidden_states.shape[:2], -1, own.head_dim)
        query, key, value = (
            project(hidden_states).view(heads) for project in (own.q_proj, own.k_proj, own.v_proj)
        )
        kernels = plain.compiled() if query.is_cuda else None
        query, key = (kernels or plain).rotate(query, key, *position_embeddings)
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, own.layer_idx)
        seen, weights = attend(query, key, value, attention_mask, own.scaling)
        by_row = weights.unflatten(2, (query.shape[1], -1))
        return own.o_proj(seen), by_row.transpose(2, 3).flatten(1, 2)

    return forward


def _mlp(own: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        gate = plain.gate_of(own.act_fn, x.is_cuda)
        down: Tensor = own.down_proj(gate(own.gate_proj(x), own.up_proj(x)))
        return down

    return forward


def _llama_norm(own: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        kind = torch.promote_types(x.dtype, own.weight.dtype)
        made: Tensor = compiled_or_plain(x).norm(
            x, own.weight, None, 0.0, own.variance_epsilon, kind
        )
        return made

    return forward


def _gemma_norm(own: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def forward(x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        normed = compiled_or_plain(x).norm
        if cond is None or own.dense is None:
            return normed(x, own.weight, None, 1.0, own.eps, x.dtype), None
        scale, shift, gate = own.dense(cond).chunk(3, -1)
        return normed(x, scale, shift, 1.0, own.eps, x.dtype), gate[:, None].to(x.dtype)

    return forward


@cache
def compiled() -> ModuleType | None:
    """`lean_cuda`, once it has run."""

    def run() -> ModuleType:
        from . import lean_cuda

        x = torch.zeros(1, 1, 2, 4, device="cuda")
        lean_cuda.masked_softmax(x, x[:, :, :1], 1.0, 2)
        lean_cuda.norm(x[0], x[0, 0, 0], None, 1.0, 1e-6, x.dtype)
        lean_cuda.rope(x, torch.zeros(1, 1, dtype=torch.long, device="cuda"), x[0, 0, 0, :2] + 1)
        return lean_cuda

    return built(run, "Robot policies norm, turn and attend in several launches")
