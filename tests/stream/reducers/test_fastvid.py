"""Scenes, anchor frames and density merging, against loops."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from stream.check import check_reducer
from stream.data import Budget, PatchGrid, VisualTokens
from stream.memory import Memory
from stream.plan import Plan
from stream.reducers.base import reduce_stage
from stream.reducers.fastvid import FastVID
from stream.signals import Signal, Signals


def scenes(lengths: list[int], patches: int, seed: int = 0) -> tuple[VisualTokens, Tensor]:
    """Frames of a scene differ by little, scenes are unlike one another."""
    draw = torch.Generator().manual_seed(seed)
    parts = [
        torch.randn(1, patches, 8, generator=draw)
        + 2 * torch.randn(1, 1, 8, generator=draw)
        + 0.3 * torch.randn(length, patches, 8, generator=draw)
        for length in lengths
    ]
    x = torch.cat(parts)
    times = tuple(float(t) for t in range(len(x)))
    grid = PatchGrid(len(x), 1, patches)
    return VisualTokens.full(x.flatten(0, 1), grid, times), torch.rand(grid.size, generator=draw)


def reduced(tokens: VisualTokens, saliency: Tensor, k: int, **settings: Any) -> tuple[Plan, Memory]:
    memory = Memory()
    signals = Signals({Signal.SALIENCY: saliency})
    return reduce_stage(FastVID(**settings), tokens, signals, Budget(k), memory), memory


def densest(x: Tensor, valid: list[int], k: int, neighbours: int) -> list[int]:
    """DPC-KNN by loops over pairs of the valid tokens of one frame."""
    far = {(i, j): float((x[i] - x[j]).norm()) / x.shape[1] ** 0.5 for i in valid for j in valid}
    rho = {}
    for i in valid:
        near = sorted(far[i, j] for j in valid)[: min(neighbours, len(valid))]
        rho[i] = float(torch.exp(-torch.tensor([d * d for d in near]).mean()))
    score = {}
    for i in valid:
        denser = [far[i, j] for j in valid if rho[j] > rho[i]]
        score[i] = rho[i] * (min(denser) if denser else max(far.values()))
    return sorted(sorted(valid, key=lambda i: -score[i])[:k])


def by_hand(
    x: Tensor, saliency: Tensor, cuts: list[int], salient: int, quota: dict[int, int], stride: int
) -> dict[tuple[int, int], Tensor]:
    """(frame, patch) -> token. cuts: starts of scenes and the number of frames."""
    frames, patches, _ = x.shape
    top = [sorted(saliency[t].topk(salient).indices.tolist()) for t in range(frames)]
    out = {(t, i): x[t, i] for t in range(frames) for i in top[t]}
    for start, stop in pairwise(cuts):
        rest = [(t, i) for t in range(start, stop) for i in range(patches) if i not in top[t]]
        for frame in range(stop - 1, start - 1, -stride):
            valid = [i for i in range(patches) if i not in top[frame]]
            targets = densest(x[frame], valid, quota[frame], 4)
            members: dict[int, list[Tensor]] = {i: [] for i in targets}
            for t, i in rest:
                alike = torch.cosine_similarity(x[t, i][None], x[frame, targets], dim=-1)
                members[targets[int(alike.argmax())]].append(x[t, i])
            for i in targets:
                out[frame, i] = 0.6 * x[frame, i] + 0.4 * torch.stack(members[i]).mean(0)
    return dict(sorted(out.items()))


def test_a_video_equals_loops_over_scenes_and_tokens() -> None:
    """Ten tokens a frame: six salient; four of each of five frames go to two anchor frames."""
    tokens, saliency = scenes([5, 2], 30)
    plan, memory = reduced(tokens, saliency, 70, scenes=2, tau=-1.0)
    assert memory.state["segments"] == [0, 5]
    quota = {4: 10, 0: 10, 6: 8}
    x = tokens.x.view(7, 30, 8)
    expected = by_hand(x, saliency.view(7, 30), [0, 5, 7], 6, quota, 4)
    assert plan.anchor.tolist() == [30 * t + i for t, i in expected]
    assert torch.allclose(plan.apply(tokens.x), torch.stack(list(expected.values())), atol=1e-5)


def test_scenes_end_at_unlike_frames_and_at_the_least_alike_ones() -> None:
    tokens, saliency = scenes([3, 4, 2], 12)
    assert reduced(tokens, saliency, 50)[1].state["segments"][:1] == [0]
    assert reduced(tokens, saliency, 50, scenes=1, tau=0.8)[1].state["segments"] == [0, 3, 7]
    assert reduced(tokens, saliency, 50, scenes=3, tau=-1)[1].state["segments"] == [0, 3, 7]
    assert reduced(tokens, saliency, 50, scenes=99, tau=-1)[1].state["segments"] == list(range(9))


@pytest.mark.parametrize("k", [1, 6, 40, 70, 107])
def test_every_budget_is_met_and_rows_keep_their_mass(k: int) -> None:
    tokens, saliency = scenes([6, 3], 12)
    plan, _ = reduced(tokens, saliency, k, contextual=0.7)
    assert plan.k == k
    assert torch.allclose(plan.dense().sum(1), torch.ones(k), atol=1e-5)


def test_other_settings_keep_the_contract() -> None:
    assert check_reducer("fastvid", stride=1, contextual=1.0, scenes=2) == []
