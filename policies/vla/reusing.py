"""Prefixes of which only some visual tokens are computed anew; the rest is that of the tick before.

What a reducer that `reuses` drops is not gone: it stays in the prompt as it was computed last.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from stream.data import VisualTokens
from stream.memory import Memory
from stream.reducers.base import Reducer, reduce_stage
from stream.reducers.vla_cache import STATE

from ..hooks import ReductionHooks
from ..prefill import VideoSpan, lift
from ..reuse import prefill_reusing

BEFORE = "prefix_before"


@dataclass(frozen=True, slots=True, eq=False)
class Laid:
    """A prompt of the tick before: one row of a cache, behind `pad` entries of padding. layout: all
    that decides where its tokens stand; prompts of another layout cannot reuse it."""

    cache: DynamicCache
    row: int
    pad: int
    layout: Hashable


def prefill(
    text_model: PreTrainedModel,
    hooks: ReductionHooks,
    reducer: Reducer,
    spans: Sequence[VideoSpan],
    prompt: tuple[Tensor, Tensor, Tensor | None],
    layouts: Sequence[tuple[int, Hashable]],
) -> tuple[DynamicCache, int]:
    """Prefill one prompt for each span, and remember it in the span's memory.

    All prompts reuse, or none does: the first tick of an episode, or of one with another layout,
    is computed whole.

    spans: the visual tokens of each prompt, unreduced. prompt: rows [b, n, d], their positions
    long [b, n], and bool [b, n], False for padding, or None without any. Returns a cache of all n
    rows, and how many visual tokens of each prompt were computed. layouts: of each prompt, the
    padding on its left and its `Laid.layout`.
    """
    rows, position, shown = prompt
    memories = [span.memory for span in spans]
    before = _recalled(memories, layouts, rows.shape[1])
    if before is None:
        for memory in memories:
            memory.state.pop(STATE, None)
    plans = [
        reduce_stage(
            reducer,
            VisualTokens(x[span.slots], span.plan.anchor, span.grid, span.pts_s),
            span.signals,
            span.budget,
            span.memory,
        )
        for span, x in zip(spans, rows, strict=True)
    ]
    listed, n = [[span] for span in spans], rows.shape[1]
    computed, visual = plans[0].k, plans[0].n
    if before is None or computed == visual or any(plan.k != computed for plan in plans):
        cache, computed = DynamicCache(), visual
        with hooks:
            hooks.expect(listed, text_from=n)
            text_model(
                inputs_embeds=rows,
                past_key_values=cache,
                position_ids=position,
                attention_mask=shown,
                use_cache=True,
            )
    else:
        anew = torch.stack(
            [
                lift([(span.slots, plan)], n, rows.device).anchor
                for span, plan in zip(spans, plans, strict=True)
            ]
        )
        _, cache = prefill_reusing(text_model, rows, anew, before, position, shown)
        hooks.adopt(cache, listed, n)
    for row, (memory, (pad, layout)) in enumerate(zip(memories, layouts, strict=True)):
        memory.state[BEFORE] = Laid(cache, row, pad, layout)
    return cache, computed


def _recalled(
    memories: Sequence[Memory], layouts: Sequence[tuple[int, Hashable]], length: int
) -> DynamicCache | None:
    """The prompts of the tick before as one cache of `length` entries, padded as those of now are;
    None unless each is there and laid out alike."""
    held: list[Laid | None] = [memory.state.get(BEFORE) for memory in memories]
    pads = [pad for pad, _ in layouts]
    laid = [o for o, (_, now) in zip(held, layouts, strict=True) if o and o.layout == now]
    if len(laid) < len(held):
        return None
    first = laid[0].cache
    if all(
        one.cache is first and (one.row, one.pad) == now
        for one, now in zip(laid, enumerate(pads), strict=True)
    ):
        whole: Any = first.layers[0]
        if whole.keys.shape[0] == len(laid):
            return first

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        rows = []
        for tensor, one, pad in zip(tensors, laid, pads, strict=True):
            row = tensor[one.row, :, one.pad : one.pad + length - pad]
            rows.append(F.pad(row, (0, 0, pad, 0)))
        return torch.stack(rows)

    together = DynamicCache()
    for depth in range(len(first.layers)):
        layers: list[Any] = [one.cache.layers[depth] for one in laid]
        together.update(joined([x.keys for x in layers]), joined([x.values for x in layers]), depth)
    return together
