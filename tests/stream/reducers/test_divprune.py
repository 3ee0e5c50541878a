"""Greedy max-min diversity against a loop over all pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stream.check import check_reducer
from stream.data import Budget, PatchGrid, VisualTokens
from stream.memory import Memory
from stream.reducers.base import reduce_stage
from stream.reducers.divprune import DivPrune
from stream.signals import Signals


def kept(x: Tensor, k: int) -> list[int]:
    tokens = VisualTokens.full(x, PatchGrid(1, 1, len(x)), (0.0,))
    plan = reduce_stage(DivPrune(), tokens, Signals({}), Budget(k), Memory())
    assert plan.is_gather
    return [int(i) for i in plan.anchor]


def by_hand(x: Tensor, k: int) -> list[int]:
    """Pair by pair in float64."""
    unit = x.double() / x.double().norm(dim=-1, keepdim=True)
    n = len(x)
    far = [[1 - float(unit[i] @ unit[j]) for j in range(n)] for i in range(n)]
    chosen = [max(range(n), key=lambda i: min(far[i][j] for j in range(n) if j != i))]
    while len(chosen) < k:
        rest = [i for i in range(n) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(far[i][j] for j in chosen)))
    return sorted(chosen)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 2, 7, 19])
def test_picks_equal_a_loop_over_all_pairs(seed: int, k: int) -> None:
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(seed))
    assert kept(x, k) == by_hand(x, k)


def test_directions_count_not_lengths_and_duplicates_come_last() -> None:
    x = torch.tensor([[1.0, 0], [5.0, 0], [0, 1.0], [0, 1.0], [-1.0, 0]])
    assert kept(x, 3) == [0, 2, 4]
    assert len(set(kept(x, 4))) == 4


def test_inside_the_model_it_keeps_the_contract_too() -> None:
    assert check_reducer("divprune", layer=3) == []
    assert DivPrune(layer=3).site.layer_index(6) == 3
