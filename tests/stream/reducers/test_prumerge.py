"""Kept tokens, what they take up, and the token for the rest, one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stream.check import check_reducer
from stream.data import Budget
from stream.memory import Memory
from stream.plan import Plan
from stream.reducers.base import reduce_stage
from stream.reducers.prumerge import PruMerge
from stream.signals import Signal, Signals
from tests.stream.reducers.test_visionzip import scene


def pruned(frames: int, k: int, reducer: PruMerge, seed: int = 0) -> tuple[Plan, Tensor, Tensor]:
    tokens, saliency = scene(frames, 20, seed)
    signals = Signals({Signal.SALIENCY: saliency})
    return reduce_stage(reducer, tokens, signals, Budget(k), Memory()), tokens.x, saliency


def by_hand(x: Tensor, saliency: Tensor, kept: list[int], neighbours: int) -> dict[int, Tensor]:
    """One frame: place -> token, the token for the rest included."""
    attention = saliency / saliency.sum()
    out = {}
    for i in kept:
        others = [j for j in range(len(x)) if j != i]
        near = sorted(others, key=lambda j: -float(torch.cosine_similarity(x[i], x[j], dim=0)))
        out[i] = x[i] + sum(attention[j] * x[j] for j in near[:neighbours])
    rest = [j for j in range(len(x)) if j not in kept]
    place = max(rest, key=lambda j: float(attention[j]))
    out[place] = torch.stack([attention[j] * x[j] for j in rest]).sum(0)
    return dict(sorted(out.items()))


@pytest.mark.parametrize("neighbours", [0, 3, 32])
@pytest.mark.parametrize("k", [2, 7, 19])
def test_a_frame_equals_a_loop_over_tokens(k: int, neighbours: int) -> None:
    plan, x, saliency = pruned(1, k, PruMerge(neighbours=neighbours))
    kept = saliency.topk(k - 1).indices.tolist()
    expected = by_hand(x, saliency, kept, min(neighbours, 19))
    assert plan.anchor.tolist() == list(expected)
    assert torch.allclose(plan.apply(x), torch.stack(list(expected.values())), atol=1e-5)


def test_evenly_spaced_tokens_join_the_attended_ones() -> None:
    """Nine of a frame: one for the rest, two by attention, six spaced over the other 18."""
    plan, x, saliency = pruned(1, 9, PruMerge(spaced=0.75, neighbours=2))
    best = saliency.topk(2).indices.tolist()
    others = [i for i in range(20) if i not in best]
    kept = [*best, *others[2::3]]
    expected = by_hand(x, saliency, kept, 2)
    assert plan.anchor.tolist() == list(expected)
    assert torch.allclose(plan.apply(x), torch.stack(list(expected.values())), atol=1e-5)


def test_one_token_of_a_frame_is_its_most_attended_one() -> None:
    plan, x, saliency = pruned(3, 4, PruMerge(neighbours=0), seed=1)
    assert plan.k == 4
    for t in (0, 1):
        (row,) = (plan.anchor // 20 == t).nonzero()
        assert int(plan.anchor[row]) % 20 == int(saliency[20 * t : 20 * t + 20].argmax())
        assert torch.equal(plan.apply(x)[row], x[plan.anchor[row]])
    assert int((plan.anchor // 20 == 2).sum()) == 2


def test_spaced_tokens_keep_the_contract_too() -> None:
    assert check_reducer("prumerge", spaced=0.75, neighbours=3) == []
