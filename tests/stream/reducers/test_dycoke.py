"""Which frames stay whole, and what the others keep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stream.check import check_reducer
from stream.data import Budget, PatchGrid, VisualTokens
from stream.memory import Memory
from stream.reducers.base import reduce_stage
from stream.reducers.dycoke import DyCoke
from stream.signals import Signals


def kept(x: Tensor, k: int, reducer: DyCoke | None = None) -> list[list[int]]:
    """Patches kept of each frame; x: [t, p, d]."""
    frames, patches, _ = x.shape
    times = tuple(float(t) for t in range(frames))
    tokens = VisualTokens.full(x.flatten(0, 1), PatchGrid(frames, 1, patches), times)
    plan = reduce_stage(reducer or DyCoke(), tokens, Signals({}), Budget(k), Memory())
    assert plan.is_gather
    out: list[list[int]] = [[] for _ in range(frames)]
    for i in plan.anchor.tolist():
        out[i // patches].append(i % patches)
    return out


def drawn(frames: int, patches: int = 10) -> Tensor:
    return torch.randn(frames, patches, 6, generator=torch.Generator().manual_seed(frames))


@pytest.mark.parametrize("frames", [2, 5, 8])
def test_published_counts_by_hand(frames: int) -> None:
    """Pairs first, then the third frame of each group of four against the first."""
    x = drawn(frames)
    got = kept(x, 1 + frames, DyCoke(counts="published", drop=0.7))
    for t in range(frames):
        if t % 4 == 0:
            assert got[t] == list(range(10))
            continue
        before = x[t - 1] if t % 2 else x[t - 2]
        alike = [float(torch.cosine_similarity(x[t, p], before[p], dim=0)) for p in range(10)]
        least = sorted(range(10), key=lambda p: alike[p])[:3]
        assert got[t] == sorted(least)


def test_exact_budgets_share_what_whole_frames_leave() -> None:
    assert [len(p) for p in kept(drawn(8), 38)] == [10, 3, 3, 3, 10, 3, 3, 3]
    assert [len(p) for p in kept(drawn(8), 23)] == [10, 0, 1, 0, 10, 1, 0, 1]


def test_below_a_quarter_fewer_frames_stay_whole() -> None:
    got = kept(drawn(8), 17)
    assert [len(p) for p in got] == [10, 1, 1, 1, 1, 1, 1, 1]
    x = drawn(8)
    (only,) = got[4]
    alike = torch.cosine_similarity(x[4], x[0], dim=-1)
    assert only == int(alike.argmin())
    assert [len(p) for p in kept(x, 9)] == [1, 1, 1, 1, 1, 1, 1, 2]


def test_a_still_patch_is_kept_once_and_a_moving_one_in_every_frame() -> None:
    x = drawn(1).repeat(4, 1, 1)
    x[:, 7] = drawn(4)[:, 7]
    assert kept(x, 13) == [list(range(10)), [7], [7], [7]]


def test_published_counts_keep_the_contract() -> None:
    assert check_reducer("dycoke", counts="published") == []
