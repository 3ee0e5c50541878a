"""A prefill that computes some rows and takes keys and values of the others from another one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from stream.errors import AttachError

from .kvcache import branch, keep_rows


def prefill_reusing(
    text_model: PreTrainedModel, embeds: Tensor, anew: Tensor, before: DynamicCache
) -> tuple[Tensor, DynamicCache]:
    """Prefill a prompt of n rows of which only those at `anew` are computed.

    A computed row attends to all rows up to its own; keys and values of rows that are not computed
    are those of `before`. That is exact if the embeddings of these rows, and of all rows before
    them, are what they were then; otherwise what is reused is as old as it is.

    embeds: [b, n, d] of the whole prompt, at positions 0 to n - 1, without padding; anew: long
    [m], ascending, the same in every sequence; before: a cache whose first n entries are those of
    a prompt laid out alike; it stays as it is. Returns the last hidden states [b, m, d] and a
    cache of n entries, in the order of the prompt.
    Source: VLA-Cache (arXiv 2502.02175), with one set of reused rows for all layers.
    """
    b, n, _ = embeds.shape
    held = before.get_seq_length()
    if held < n:
        raise AttachError(
            f"The cache of before holds {held} rows, the prompt has {n}; run a whole prefill when "
            "its length changes."
        )
    computed = torch.zeros(n, dtype=torch.bool, device=embeds.device).index_fill_(0, anew, True)
    reused = torch.sort(computed.byte(), stable=True).indices[: n - anew.numel()]
    cache = branch(before, b)
    keep_rows(cache, reused)
    columns = torch.cat([reused, anew])
    output: Any = text_model(
        inputs_embeds=embeds.index_select(1, anew),
        attention_mask=(columns <= anew[:, None]).expand(b, 1, -1, -1),
        position_ids=anew.expand(b, -1),
        past_key_values=cache,
        use_cache=True,
    )
    keep_rows(cache, columns.argsort())
    return output.last_hidden_state, cache
