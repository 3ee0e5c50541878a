"""lerobot's policies in fixed shapes act as their network is now, and run its hooks."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from policies.graphs import standing
from policies.vla.flow_policy import FlowPolicy
from stream.data import Budget
from stream.memory import Memory
from stream.reducers.vla_pruner import VLAPruner
from tests.policies import changes
from tests.policies.graphs.taped import TapedPool
from tests.policies.vla import lerobot_models
from tests.policies.vla.test_flow_captured import acted, both, same
from tests.policies.vla.test_flow_policy import observed

KINDS = sorted(lerobot_models.BUILDERS)


@pytest.fixture(params=KINDS)
def own(request: pytest.FixtureRequest) -> Any:
    made = lerobot_models.BUILDERS[request.param]()
    return made, *lerobot_models.processors(made)


def another_output(network: Any) -> None:
    network.action_out_proj = copy.deepcopy(network.action_out_proj)
    with torch.no_grad():
        network.action_out_proj.weight.mul_(1.5)


@pytest.mark.parametrize("taped", [True, False])
@pytest.mark.parametrize(
    "change", [changes.assigned, changes.moved, changes.overwritten, another_output]
)
def test_flow_policies_act_as_they_are_now(
    change: changes.Change, taped: bool, own: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if taped:
        monkeypatch.setattr(standing, "GraphPool", TapedPool)
    fixed, stock = both(own, VLAPruner(layer=3))
    assert fixed.captured is not None
    seen = observed(1)
    before = acted(fixed, seen, 9, steps=2)
    same(before, acted(stock, seen, 9, steps=2))
    held = fixed.prefill(fixed.encode(seen), Budget(9), Memory())
    graphs, pool = fixed.captured.pool.captured, fixed.captured.pool
    change(own[0].model)
    mine, theirs = (one.act(held, seen, 2, seed=4) for one in (fixed, stock))
    same((mine[0].actions, mine[1]), (theirs[0].actions, theirs[1]))
    after = acted(fixed, seen, 9, steps=2)
    same(after, acted(stock, seen, 9, steps=2))
    assert np.array_equal(before[0], after[0]) == (change is changes.moved)
    assert (fixed.captured.pool is pool) == (change is changes.overwritten)
    assert fixed.captured.pool.captured == graphs


def test_hooks_on_flow_policies_run(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "GraphPool", TapedPool)
    fixed, stock = both(own, VLAPruner(layer=3))
    assert fixed.captured is not None
    seen, network = observed(1), own[0].model
    names = [name for name, _ in network.named_modules() if name.endswith("mlp.up_proj")]
    free = acted(fixed, seen, 9, steps=2)
    graphs = fixed.captured.pool.captured
    with changes.hooked(network, names[-1]) as ran:
        with pytest.warns(UserWarning, match="Policy has hooks") as warned:
            mine = acted(fixed, seen, 9, steps=2)
        count = len(ran)
        same(mine, acted(stock, seen, 9, steps=2))
        assert len(ran) == 2 * count > 0
        assert len(warned) == 1
    assert not np.array_equal(mine[0], free[0])
    same(acted(fixed, seen, 9, steps=2), free)
    assert fixed.captured.pool.captured == graphs


def test_a_policy_that_was_hooked_from_the_start_is_never_captured(
    own: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standing, "GraphPool", TapedPool)
    policy_, before, after = own
    name = next(n for n, _ in policy_.model.named_modules() if n.endswith("mlp.up_proj"))
    with changes.hooked(policy_.model, name):
        fixed = FlowPolicy(policy_, before, after, capture="on")
        assert fixed.captured is not None
        with pytest.warns(UserWarning, match="hooks"):
            acted(fixed, observed(1), 9, steps=1)
        assert (fixed.captured.pool.captured, fixed.captured.pool.uncaptured) == (0, 3)
