"""Dominant and contextual tokens of a frame, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stream.check import check_reducer
from stream.data import Budget, PatchGrid, VisualTokens
from stream.memory import Memory
from stream.plan import Plan
from stream.reducers.base import reduce_stage
from stream.reducers.visionzip import VisionZip
from stream.signals import Signal, Signals


def scene(frames: int, patches: int, seed: int = 0) -> tuple[VisualTokens, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(frames * patches, 6, generator=draw)
    times = tuple(float(t) for t in range(frames))
    saliency = torch.rand(frames * patches, generator=draw)
    return VisualTokens.full(x, PatchGrid(frames, 1, patches), times), saliency


def zipped(tokens: VisualTokens, saliency: Tensor, k: int, **settings: Any) -> Plan:
    signals = Signals({Signal.SALIENCY: saliency})
    return reduce_stage(VisionZip(**settings), tokens, signals, Budget(k), Memory())


def by_hand(
    x: Tensor, saliency: Tensor, dominant: int, context: int, merge: str
) -> dict[int, Tensor]:
    """One frame: place -> token."""
    n = len(x)
    best = sorted(range(n), key=lambda i: -float(saliency[i]))[:dominant]
    rest = [i for i in range(n) if i not in best]
    step = max(1, len(rest) // context) if context else 1
    targets = rest[::step][:context]
    members: dict[int, list[int]] = {t: [] for t in targets}
    for i in rest if targets else []:
        if i not in targets:
            alike = {t: float(torch.cosine_similarity(x[i], x[t], dim=0)) for t in targets}
            members[max(targets, key=lambda t: alike[t])].append(i)
    out = {i: x[i] for i in best}
    for target, others in members.items():
        token = x[target]
        if others and merge == "sum":
            token = token + x[others].mean(0)
        elif others:
            token = x[[target, *others]].mean(0)
        out[target] = token
    return dict(sorted(out.items()))


@pytest.mark.parametrize("merge", ["sum", "mean"])
@pytest.mark.parametrize(
    ("k", "share", "dominant", "context"),
    [(8, 0.75, 6, 2), (9, 0.5, 4, 5), (6, 1.0, 6, 0), (5, 0.0, 0, 5), (1, 54 / 64, 1, 0)],
)
def test_a_frame_equals_a_loop_over_tokens(
    k: int, share: float, dominant: int, context: int, merge: str
) -> None:
    tokens, saliency = scene(1, 20)
    plan = zipped(tokens, saliency, k, dominant=share, merge=merge)
    expected = by_hand(tokens.x, saliency, dominant, context, merge)
    assert plan.anchor.tolist() == list(expected)
    assert torch.allclose(plan.apply(tokens.x), torch.stack(list(expected.values())), atol=1e-5)


def test_frames_are_reduced_apart_and_share_the_budget() -> None:
    tokens, saliency = scene(3, 20)
    plan = zipped(tokens, saliency, 23)
    for t, k in enumerate([7, 8, 8]):
        one = slice(20 * t, 20 * t + 20)
        expected = by_hand(
            tokens.x[one], saliency[one], round(k * 54 / 64), k - round(k * 54 / 64), "sum"
        )
        at = plan.anchor // 20 == t
        assert (plan.anchor[at] % 20).tolist() == list(expected)
        got = plan.apply(tokens.x)[at]
        assert torch.allclose(got, torch.stack(list(expected.values())), atol=1e-5)


def test_averages_keep_the_contract_too() -> None:
    assert check_reducer("visionzip", merge="mean", dominant=0.5) == []
