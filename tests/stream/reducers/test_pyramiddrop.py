"""A pyramid of counts, and which tokens make it up."""

from __future__ import annotations

import pytest
import torch

from stream.data import Budget, PatchGrid, VisualTokens
from stream.errors import ConfigError
from stream.memory import Memory
from stream.reducers.base import reduce_stage
from stream.reducers.pyramiddrop import PyramidDrop
from stream.signals import Signal, Signals


def test_an_eighth_gives_the_published_counts() -> None:
    n, counts = 576, []
    for stage in PyramidDrop().stages:
        n = stage.keeps(n, Budget(72))
        counts.append(n)
    assert counts == [288, 144, 72]
    assert [s.site.layer_index(32) for s in PyramidDrop().stages] == [8, 16, 24]


@pytest.mark.parametrize("budget", [0, 1, 5, 99, 100, 300])
@pytest.mark.parametrize("layers", [(2,), (1, 2, 3, 5)])
def test_the_last_stage_meets_any_budget(budget: int, layers: tuple[int, ...]) -> None:
    n = 100
    for stage in PyramidDrop(layers=layers).stages:
        before, n = n, stage.keeps(n, Budget(budget))
        assert min(100, budget) <= n <= before
    assert n == min(100, budget)


def test_each_stage_keeps_the_top_of_its_own_scores() -> None:
    tokens = VisualTokens.full(torch.ones(8, 2), PatchGrid(1, 1, 8), (0.0,))
    scores = {Signal.LAST_ROW: torch.tensor([1.0, 8, 2, 7, 3, 6, 4, 5])}
    first = PyramidDrop(layers=(1, 2)).stages[0]
    plan = reduce_stage(first, tokens, Signals(scores), Budget(2), Memory())
    assert plan.anchor.tolist() == [1, 3, 5, 7]


def test_no_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="layers"):
        PyramidDrop.build(layers=())
