"""SDPA for fixed shapes: no copy of keys for grouped queries, also where a mask is given."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "static_sdpa"


def static_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool = True,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [b, h, n, d], key and value [b, h_kv, m, d]; mask added, [b, 1, n, m], or None, where
    queries see all keys, or those up to their own if `is_causal`.

    With a mask, the queries that share a key head are taken as one head's rows.
    """
    b, h, n, d = query.shape
    groups = h // key.shape[1]
    if attention_mask is None:
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=is_causal and n > 1, scale=scaling, enable_gqa=groups > 1
        )
    else:
        rows = query.reshape(b, key.shape[1], groups * n, d)
        mask = attention_mask
        if groups > 1:
            mask = mask.expand(-1, 1, groups, -1) if n == 1 else mask.repeat(1, 1, groups, 1)
        out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
        out = out.reshape(b, h, n, d)
    return out.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make the function known to transformers by its name."""
    if NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(NAME, static_sdpa)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
