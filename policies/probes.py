"""Attention rows and columns without eager attention.

An attention function is registered beside each of transformers' own. It lets a probe look at the
rotated queries and keys of the modules that asked for it, then hands over to the original, so
outputs stay bit-equal and no n x n map is ever held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stream.errors import AttachError

Probe = Callable[[Tensor, Tensor, float, Tensor | None], None]
"""(queries [b, h, n, d], keys [b, h_kv, m, d], scaling, mask or None) -> None"""

_PREFIX = "foveate_"
_QUERY_BLOCK = 256
_requests: WeakKeyDictionary[nn.Module, Probe] = WeakKeyDictionary()


def _probed(base: str) -> Callable[..., Any]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        probe = _requests.get(module)
        if probe is not None:
            probe(query, key, kwargs.get("scaling") or query.shape[-1] ** -0.5, attention_mask)
        return ALL_ATTENTION_FUNCTIONS[base](module, query, key, value, attention_mask, **kwargs)

    return attention


@contextmanager
def probing(model: PreTrainedModel, requests: dict[nn.Module, Probe]) -> Iterator[None]:
    """Let probes see the attention inputs of some of `model`'s attention modules.

    Restores the model's attention implementation on exit. Raises AttachError for eager attention
    and for modules that are probed already.
    """
    base = str(model.config._attn_implementation)
    if base.startswith(_PREFIX) or any(module in _requests for module in requests):
        raise AttachError(
            f"{type(model).__name__} is probed already; detach the first reducer before "
            "attaching another, or chain them into one."
        )
    if base not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        raise AttachError(
            f"{type(model).__name__} runs '{base}' attention; load it with "
            "attn_implementation='sdpa', which gives the same results and can be probed."
        )
    name = _PREFIX + base
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(name, _probed(base))
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    model.set_attn_implementation(name)
    _requests.update(requests)
    try:
        yield
    finally:
        for module in requests:
            _requests.pop(module, None)
        model.set_attn_implementation(base)


def last_row(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    """Softmax attention of the last query to every key, mean over heads, float32 [b, m]."""
    logits = _logits(query[:, :, -1:], key, scaling)
    if mask is not None:
        row = mask[:, :, -1:, : key.shape[2]]
        logits = logits.masked_fill(~row, -torch.inf) if row.dtype == torch.bool else logits + row
    return logits.softmax(-1).mean(1)[:, 0]


def column_mean(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Mean attention each key receives over heads and queries, float32 [b, m], no causal mask.

    Works through blocks of queries, so memory is [b, h, block, m].
    """
    total = torch.zeros(query.shape[0], key.shape[2], device=query.device)
    for block in torch.split(query, _QUERY_BLOCK, dim=2):
        total += _logits(block, key, scaling).softmax(-1).sum((1, 2))
    return total / (query.shape[1] * query.shape[2])


def _logits(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key = key.float().repeat_interleave(groups, dim=1)
    return query.float() @ key.mT * scaling
