"""KV caches that grow with a stream: branches for questions, rows taken out, keys turned to new
positions.

A rotary embedding is baked into cached keys. Rotations add up, so a key goes from position p to q
by a rotation of q - p, exactly; values carry no position.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from stream.errors import AttachError

_MOVING_ROPES = {"dynamic", "longrope"}


def branch(cache: DynamicCache, rows: int = 1) -> DynamicCache:
    """The same cache for `rows` sequences that go on apart.

    Nothing is copied: a dynamic cache makes new tensors when it grows, so what a branch adds never
    reaches its origin.
    """
    twin = copy(cache)
    twin.layers = [copy(layer) for layer in cache.layers]
    for layer in _filled(twin):
        layer.keys = layer.keys.expand(rows, -1, -1, -1)
        layer.values = layer.values.expand(rows, -1, -1, -1)
    return twin


def keep_rows(cache: DynamicCache, index: Tensor) -> None:
    """Keep the tokens `index` (long [n]) of every layer, in that order; the others leave."""
    for layer in _filled(cache):
        layer.keys = layer.keys.index_select(2, index)
        layer.values = layer.values.index_select(2, index)


def reorder_end(cache: DynamicCache, order: Tensor) -> None:
    """Lay the last n tokens of every layer out anew: order long [b, n], the old place of each."""
    n = order.shape[1]
    for layer in _filled(cache):
        index = order[:, None, :, None].expand_as(layer.keys[:, :, -n:])
        for held in (layer.keys, layer.values):
            held[:, :, -n:] = held[:, :, -n:].gather(2, index)


def can_turn(text_model: PreTrainedModel) -> bool:
    """Whether keys can be moved exactly: not where the frequencies depend on the length."""
    rotary: Any = text_model.get_submodule("rotary_emb")
    return rotary.rope_type not in _MOVING_ROPES


def turn(text_model: PreTrainedModel, cache: DynamicCache, shift: Tensor) -> None:
    """Move every cached key by `shift` positions: long [n], or [axes, n] for rotary embeddings of
    several axes (time, row, column).

    Raises AttachError where this would not be exact.
    """
    if not can_turn(text_model):
        raise AttachError(
            f"The rotary embedding of {type(text_model).__name__} depends on the length of the "
            "sequence, so cached keys cannot be moved; set reanchor to refill."
        )
    rotary: Any = text_model.get_submodule("rotary_emb")
    cos, sin = rotary(torch.zeros(1, device=shift.device), shift[..., None, :])
    cos, sin = cos / rotary.attention_scaling, sin / rotary.attention_scaling
    if shift.ndim == 2:
        sections = text_model.config.rope_parameters["mrope_section"] * 2
        cos, sin = (_by_section(part, sections) for part in (cos, sin))
    for layer in _filled(cache):
        key = layer.keys.float()
        first, second = key.chunk(2, dim=-1)
        turned = key * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
        layer.keys = turned.to(layer.keys.dtype)


def _filled(cache: DynamicCache) -> list[Any]:
    """The layers that hold something."""
    layers: list[Any] = cache.layers
    return [layer for layer in layers if layer.get_seq_length()]


def _by_section(table: Tensor, sections: list[int]) -> Tensor:
    """[axes, b, n, d] -> [b, n, d]: each section of channels turns with its own axis."""
    parts = table.split(sections, dim=-1)
    return torch.cat([part[i % table.shape[0]] for i, part in enumerate(parts)], dim=-1)
