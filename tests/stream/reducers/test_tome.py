"""Rounds of bipartite matching against loops over pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stream.data import Budget, PatchGrid, VisualTokens
from stream.memory import Memory
from stream.plan import Plan
from stream.reducers.base import reduce_stage
from stream.reducers.tome import ToMe, matched
from stream.signals import Signals


def drawn(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


def merged(x: Tensor, k: int) -> Plan:
    tokens = VisualTokens.full(x, PatchGrid(1, 1, len(x)), (0.0,))
    return reduce_stage(ToMe(), tokens, Signals({}), Budget(k), Memory())


def one_round(x: Tensor, size: list[float], merges: int) -> tuple[Tensor, list[int]]:
    """(states, their places) pair by pair."""
    odd = range(1, len(x), 2)
    edges = []
    for a in range(0, len(x), 2):
        alike = {b: float(torch.cosine_similarity(x[a], x[b], dim=0)) for b in odd}
        b = max(odd, key=lambda j: alike[j])
        edges.append((-alike[b], a, b))
    sums = {i: x[i] * size[i] for i in range(len(x))}
    total = dict(enumerate(size))
    for _, a, b in sorted(edges)[:merges]:
        sums[b] = sums[b] + x[a] * size[a]
        total[b] += size[a]
        del sums[a]
    return torch.stack([sums[i] / total[i] for i in sums]), list(sums)


@pytest.mark.parametrize("n", [2, 7, 12])
@pytest.mark.parametrize("seed", range(3))
def test_a_round_equals_a_loop_over_pairs(n: int, seed: int) -> None:
    x = drawn(n, seed)
    size = [1.0 + i % 3 for i in range(n)]
    for merges in range(n // 2 + 1):
        plan = matched(x, torch.tensor(size), merges)
        states, places = one_round(x, size, merges)
        assert plan.anchor.tolist() == places
        assert torch.allclose(plan.apply(x), states, atol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 6, 11])
def test_every_patch_counts_equally_in_the_token_it_went_to(k: int) -> None:
    x = drawn(12)
    plan = merged(x, k)
    dense = plan.dense()
    assert torch.equal((dense > 0).sum(0), torch.ones(12, dtype=torch.long))
    for row in dense:
        shares = row[row > 0]
        assert torch.allclose(shares, torch.full_like(shares, 1 / len(shares)), atol=1e-6)


def test_pairs_of_equal_patches_merge_first() -> None:
    x = drawn(8)
    x[4] = x[1]
    x[6] = 3 * x[3]  # the direction is what counts
    dense = merged(x, 6).dense()
    assert dense[0, 0] == 1.0
    assert dense.nonzero().tolist()[1:5] == [[1, 1], [1, 4], [2, 2], [3, 3]]
    assert torch.allclose(dense[3, [3, 6]], torch.tensor([0.5, 0.5]))
