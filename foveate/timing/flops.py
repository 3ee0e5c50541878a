"""Floating-point operations of a request, counted from sizes, the scoring of tokens included.

A multiplication and an addition are two operations. Attention of a causal model counts half.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .arms import Arm, AttachedArm
from .subjects import linear_weights


def decoder_flops(text_model: Any, new: Sequence[int], seen: Sequence[int]) -> float:
    """`new` tokens at each layer, each of which sees the `seen` tokens before them and its own."""
    config = text_model.config
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    total = 0.0
    for layer, n, before in zip(text_model.layers, new, seen, strict=True):
        total += 2.0 * n * linear_weights(layer) + 4.0 * width * n * (before + n / 2)
    return total


def request_flops(arm: Arm) -> dict[str, float]:
    """Operations of one request by stage: encode, score, prefill, and what makes the answer."""
    subject, prompt = arm.subject, arm.subject.prompt
    text, head = subject.text_model, linear_weights(subject.head)
    others = prompt.before + prompt.after
    lengths = [n + others for n in arm.layer_tokens]
    none, ones = [0] * len(lengths), [1] * len(lengths)
    tokens = sum(
        decoder_flops(text, ones, [n + step for n in lengths]) + 2.0 * head
        for step in range(prompt.decode)
    )
    if isinstance(arm, AttachedArm):
        question = [prompt.after - 1] * len(lengths)
        seen = [n - prompt.after + 1 for n in lengths]
        return {"question": decoder_flops(text, question, seen) + 2.0 * head, "tokens": tokens}
    return arm.acting_flops(lengths) | {
        "encode": subject.encode_flops(arm.tower_layers()),
        "score": score_flops(arm),
        "prefill": decoder_flops(text, lengths, none) + 2.0 * head,
        "tokens": tokens,
    }


def score_flops(arm: Arm) -> float:
    """What choosing costs: saliency, similarities of frames, and rows of attention inside."""
    if arm.reducer is None:
        return 0.0
    subject = arm.subject
    grid, size = subject.grid, subject.text_model.config.hidden_size
    total = subject.score_flops() if arm.scored else 0.0
    if any(not s.site.in_llm for s in arm.reducer.stages):
        total += 2.0 * grid.size * size * (1 + grid.per_frame)
    for stage in arm.inside:
        layer = stage.site.layer_index(len(arm.layer_tokens)) - 1
        n = arm.layer_tokens[layer]
        total += 2.0 * size * subject.prompt.after * (n + subject.prompt.before)
        total += 2.0 * size * n * min(n, 2 * arm.budget.tokens)
    return total
