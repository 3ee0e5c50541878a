"""A prefill that computes some rows and takes keys and values of the others from another one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from stream.errors import AttachError

from .kvcache import branch


def prefill_reusing(
    text_model: PreTrainedModel,
    embeds: Tensor,
    anew: Tensor,
    before: DynamicCache,
    position: Tensor | None = None,
    shown: Tensor | None = None,
) -> tuple[Tensor, DynamicCache]:
    """Prefill prompts of n rows of which only those at `anew` are computed.

    A computed row attends to all rows up to its own; keys and values of rows that are not computed
    are those of `before`. That is exact if the embeddings of these rows, and of all rows before
    them, are what they were then; otherwise what is reused is as old as it is.

    embeds: [b, n, d] of the whole prompts; anew: long [b, m], ascending; before: a cache whose
    first n entries are those of prompts laid out alike; it stays as it is. position: long [b, n],
    0 to n - 1 if None; shown: bool [b, n], False for padding. Returns the last hidden states
    [b, m, d] and a cache of n entries, in the order of the prompt.
    Source: VLA-Cache (arXiv 2502.02175), with one set of reused rows for all layers.
    """
    b, n, _ = embeds.shape
    held = before.get_seq_length()
    if held < n:
        raise AttachError(
            f"The cache of before holds {held} rows, the prompt has {n}; run a whole prefill when "
            "its length changes."
        )
    place = torch.arange(n, device=embeds.device).expand(b, -1)
    computed = torch.zeros(b, n, dtype=torch.bool, device=embeds.device).scatter_(1, anew, True)
    reused = torch.sort(computed.byte(), stable=True).indices[:, : n - anew.shape[1]]
    columns = torch.cat([reused, anew], dim=1)
    seen = columns[:, None] <= anew[..., None]
    if shown is not None:  # a row of padding sees itself, so that it stays finite
        seen &= shown.gather(1, columns)[:, None] | (columns[:, None] == anew[..., None])
    cache = branch(before, b)
    _take(cache, reused)
    output: Any = text_model(
        inputs_embeds=embeds.take_along_dim(anew[..., None], dim=1),
        attention_mask=seen[:, None],
        position_ids=(place if position is None else position).gather(1, anew),
        past_key_values=cache,
        use_cache=True,
    )
    _take(cache, columns.argsort(1))
    return output.last_hidden_state, cache


def _take(cache: DynamicCache, places: Tensor) -> None:
    """Keep the entries at `places`, long [b, r], of each sequence, in that order."""
    layers: list[Any] = cache.layers
    at = places[:, None, :, None]
    for layer in layers:
        layer.keys = layer.keys.take_along_dim(at, dim=2)
        layer.values = layer.values.take_along_dim(at, dim=2)
