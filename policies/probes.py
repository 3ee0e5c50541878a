"""Attention rows and columns without eager attention.

An attention function is registered beside each of transformers' own. It lets a probe look at the
rotated queries and keys of the modules that asked for it, then hands over to the original, so
outputs stay bit-equal and no n x n map is ever held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stream.errors import AttachError
from stream.ops.built import built

_PREFIX = "foveate_"
_QUERY_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Attention:
    """What one call of an attention function is given.

    query: [b, h, n, d] and key: [b, h_kv, m, d], rotated; the queries belong to the last n keys.
    mask: [1 or b, 1 or h, n, m or more], bool (True = may look) or added to the logits; without
    one every query looks at all keys, or at those up to its own if `causal`.
    """

    query: Tensor
    key: Tensor
    scaling: float
    mask: Tensor | None
    causal: bool

    def received(self, rows: Tensor, taken: Tensor) -> Tensor:
        """Attention each key receives, mean over heads and query rows, float32 [b, m].

        rows: long [b, r], queries of each sequence; taken: bool [b, r], which of them count. What
        a row may not see it gives 0. Works through blocks of rows: memory is [b, h, block, m].
        """
        key = self.key.float()
        total = torch.zeros(key.shape[0], key.shape[2], device=key.device)
        blocks = zip(rows.split(_QUERY_BLOCK, 1), taken.split(_QUERY_BLOCK, 1), strict=True)
        for block, counts in blocks:
            logits = self._logits(block, key)
            highest = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
            seen = logits.sub_(highest).exp_()
            weight = torch.where(counts[:, None], seen.sum(-1).reciprocal_(), 0.0)
            total += (weight[:, :, None] @ seen)[:, :, 0].sum(1)
        return total / (self.query.shape[1] * taken.sum(-1, keepdim=True).clamp_min(1))

    def received_from_all(self) -> Tensor:
        """`received` with every query."""
        free = self.mask is None and not self.causal and not torch.is_grad_enabled()
        if free and self.query.is_cuda and (fused := compiled()):
            received: Tensor = fused.received_from_all(self.query, self.key, self.scaling)
            return received
        batch, n = self.query.shape[0], self.query.shape[2]
        rows = torch.arange(n, device=self.query.device).expand(batch, -1)
        return self.received(rows, torch.ones_like(rows, dtype=torch.bool))

    def _logits(self, rows: Tensor, key: Tensor) -> Tensor:
        """float32 [b, h, r, m] of query rows long [b, r]; hidden keys have the lowest number."""
        at = rows[:, None, :, None]
        query = self.query.take_along_dim(at, 2).float()
        b, h, r, d = query.shape
        m = key.shape[2]
        grouped = query.reshape(b, key.shape[1], -1, d)  # heads that share keys, side by side
        logits = (grouped @ key.mT).view(b, h, r, m) * self.scaling
        lowest = torch.finfo(logits.dtype).min
        if self.mask is not None:
            mask = self.mask[..., :m].take_along_dim(at, 2)
            return logits.masked_fill(~mask, lowest) if mask.dtype == torch.bool else logits + mask
        if self.causal:
            own = at + m - self.query.shape[2]
            return logits.masked_fill(torch.arange(m, device=key.device) > own, lowest)
        return logits


@cache
def compiled() -> ModuleType | None:
    """`received_cuda`, once it has run."""

    def run() -> ModuleType:
        from . import received_cuda

        x = torch.zeros(1, 1, 2, 16, device="cuda")
        received_cuda.received_from_all(x, x, 1.0)
        return received_cuda

    return built(run, "Received attention is summed over blocks of its map")


Probe = Callable[[Attention], None]
_requests: WeakKeyDictionary[nn.Module, list[Probe]] = WeakKeyDictionary()


def _probed(base: str) -> Callable[..., Any]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        if probes := _requests.get(module):
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            causal = kwargs.get("is_causal")
            if causal is None:
                causal = getattr(module, "is_causal", True)
            seen = Attention(query, key, scaling, attention_mask, causal)
            for probe in probes:
                probe(seen)
        return ALL_ATTENTION_FUNCTIONS[base](module, query, key, value, attention_mask, **kwargs)

    return attention


@contextmanager
def probing(model: PreTrainedModel, requests: dict[nn.Module, Probe]) -> Iterator[None]:
    """Let probes see the attention inputs of some of `model`'s attention modules.

    Probes of one model may be nested. The outermost restores the model's attention implementation.
    Raises AttachError for eager attention.
    """
    base = str(model.config._attn_implementation)
    name = base if base.startswith(_PREFIX) else _PREFIX + base
    base = name.removeprefix(_PREFIX)
    if base not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        raise AttachError(
            f"{type(model).__name__} runs '{base}' attention; load it with "
            "attn_implementation='sdpa', which gives the same results and can be probed."
        )
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(name, _probed(base))
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    before = model.config._attn_implementation
    model.config._attn_implementation = name  # the model's own setter walks through every module
    for module, probe in requests.items():
        _requests.setdefault(module, []).append(probe)
    try:
        yield
    finally:
        for module, probe in requests.items():
            _requests[module].remove(probe)
            if not _requests[module]:
                del _requests[module]
        model.config._attn_implementation = before
