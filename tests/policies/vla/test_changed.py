"""OpenVLA-shaped policies in fixed shapes act as their network is now, and run its hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from policies.graphs import standing
from policies.vla.openvla import OpenVLAPolicy
from stream.data import Budget, Observation
from stream.memory import Memory
from stream.reducers.base import Reducer
from stream.reducers.vla_cache import VLACache
from stream.reducers.vla_pruner import VLAPruner
from tests.policies import changes
from tests.policies.graphs.taped import ScarcePool, TapedPool
from tests.policies.vla.openvla_parts import observation, policy
from tests.policies.vla.test_captured import CAPTURES, HEADS, check, episode

LAYERS = "language_model.layers.1"
BUDGETS = (8, 32, 8)
SEEN = [observation(i, time_s=0.1 * i) for i in range(len(BUDGETS))]


def converted(network: nn.Module) -> None:
    network.double()


def another_head(network: Any) -> None:
    network.action_head = copy.deepcopy(network.action_head)
    with torch.no_grad():
        for weight in network.action_head.parameters():
            weight.neg_()


def another_tower(network: Any) -> None:
    changes.assigned(network.towers[0])


def another_table(network: Any) -> None:
    """A buffer: the frequencies of positions."""
    network.language_model.rotary_emb.inv_freq = network.language_model.rotary_emb.inv_freq * 2


CHANGES = [
    changes.assigned,
    changes.overwritten,
    changes.adapted,
    converted,
    another_head,
    another_tower,
    another_table,
]


def pair(head: str, reducer: Reducer) -> tuple[OpenVLAPolicy, OpenVLAPolicy]:
    """In fixed shapes and as it stands, with networks that are alike."""
    fixed, stock = (policy(head, reducer, capture) for capture in CAPTURES)
    return fixed, stock


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("taped", [True, False])
def test_openvla_acts_as_its_network_is_now(
    taped: bool, change: changes.Change, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if taped:
        monkeypatch.setattr(standing, "GraphPool", TapedPool)
    both = fixed, stock = pair(head, VLAPruner(layer=2))
    assert fixed.captured is not None
    before = episode(fixed, SEEN, BUDGETS)
    check(before, episode(stock, SEEN, BUDGETS))
    graphs, pool = fixed.captured.pool.captured, fixed.captured.pool
    assert (graphs > 0) == taped
    for one in both:
        change(one.model)
    after = episode(fixed, SEEN, BUDGETS)
    check(after, episode(stock, SEEN, BUDGETS))
    assert not torch.allclose(before[0].actions, after[0].actions) or change is converted
    assert (fixed.captured.pool is pool) == (change is changes.overwritten)
    assert fixed.captured.pool.captured == graphs
    episode(fixed, SEEN, BUDGETS)
    assert fixed.captured.pool.captured == graphs


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("change", CHANGES)
def test_prefixes_from_before_a_change_are_acted_from(
    change: changes.Change, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standing, "GraphPool", TapedPool)
    both = fixed, stock = pair(head, VLAPruner(layer=2))
    assert fixed.captured is not None
    held = [
        [
            one.prefill(one.encode(o), Budget(n), Memory())
            for o, n in zip(SEEN, BUDGETS, strict=True)
        ]
        for one in both
    ]
    fixed.act(held[0][0], SEEN[0])
    for one in both:
        change(one.model)
    for i in (2, 0, 1, 2):  # the last one lies in the buffers of the decoder, the others moved out
        mine, theirs = (one.act(own[i], SEEN[i]) for one, own in zip(both, held, strict=True))
        assert np.allclose(mine[0].actions, theirs[0].actions, atol=1e-5)
        assert torch.allclose(mine[1], theirs[1], atol=1e-5)
    check(episode(fixed, SEEN, BUDGETS), episode(stock, SEEN, BUDGETS))
    mine, theirs = (one.act(own[1], SEEN[0]) for one, own in zip(both, held, strict=True))
    assert np.allclose(mine[0].actions, theirs[0].actions, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("change", [changes.assigned, changes.adapted, another_tower])
def test_ticks_that_reuse_what_was_prefilled_before_a_change(
    change: changes.Change, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standing, "GraphPool", TapedPool)
    both = fixed, stock = pair(head, VLACache())

    def ticks(one: OpenVLAPolicy) -> Any:
        memory = Memory()

        def tick(observed: Observation) -> Any:
            prefix = one.prefill(one.encode(observed), Budget(8), memory)
            chunk, attention = one.act(prefix, observed)
            one.remember(prefix, attention, memory)
            return chunk.actions, prefix.tokens

        return tick

    tick_fixed, tick_stock = ticks(fixed), ticks(stock)
    for i in range(4):
        if i == 2:
            for one in both:
                change(one.model)
        (mine, tokens), (theirs, _) = tick_fixed(observation(i)), tick_stock(observation(i))
        assert np.allclose(mine, theirs, atol=1e-5)
        assert (tokens == 8) == (i > 0)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("other", [changes.hooked, changes.replaced_forward])
@pytest.mark.parametrize("where", [f"{LAYERS}.mlp.up_proj", "projector.2", "action_head"])
def test_hooks_on_openvla_run(
    where: str, other: Callable[..., Any], head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standing, "GraphPool", TapedPool)
    fixed, stock = pair(head, VLAPruner(layer=2))
    assert fixed.captured is not None
    free = episode(fixed, SEEN, BUDGETS)
    pool = fixed.captured.pool
    graphs, held = pool.captured, fixed.prefill(fixed.encode(SEEN[0]), Budget(8), Memory())
    with other(fixed.model, where) as ran, other(stock.model, where) as ran_stock:
        with pytest.warns(UserWarning, match="OpenVLA has hooks"):
            bound = episode(fixed, SEEN[:1], BUDGETS[:1])
        check(bound, episode(stock, SEEN[:1], BUDGETS[:1]))
        check(episode(fixed, SEEN, BUDGETS), episode(stock, SEEN, BUDGETS))
        assert len(ran) == len(ran_stock) > 0
        launched = pool.uncaptured
        assert launched > 0
        within, _ = fixed.act(held, SEEN[0])
    in_prefix = where.startswith("projector")
    assert np.allclose(within.actions, free[0].actions.numpy(), atol=1e-5) == in_prefix
    check(episode(fixed, SEEN, BUDGETS), free)
    chunk, _ = fixed.act(held, SEEN[0])
    assert np.allclose(chunk.actions, free[0].actions.numpy(), atol=1e-5)
    assert (fixed.captured.pool, pool.captured) == (pool, graphs), "what was captured stays"


def test_openvla_makes_room_once_and_goes_on_without_graphs_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of six graphs, one for the second budget, five fit."""
    monkeypatch.setattr(standing, "GraphPool", Five)
    fixed, stock = pair("parallel", VLAPruner(layer=2))
    assert fixed.captured is not None
    expected = episode(stock, SEEN, BUDGETS)
    with pytest.warns(UserWarning, match="Layers 2 to 3, .*: out of memory while capturing"):
        mine = episode(fixed, SEEN, BUDGETS)
    check(mine, expected)
    pool = fixed.captured.pool
    graphs = pool.captured
    for _ in range(3):
        check(episode(fixed, SEEN, BUDGETS), expected)
    assert (pool.captured, len(pool.fallen_back)) == (graphs, 1)
    assert pool.uncaptured == 1 + 3 * BUDGETS.count(8)


class Five(ScarcePool):
    def __init__(self, device: Any, **options: Any) -> None:
        super().__init__(device, 5, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("head", HEADS)
def test_graphs_follow_a_changed_network(head: str) -> None:
    both = [policy(head, VLAPruner(layer=2), capture, device="cuda") for capture in CAPTURES]
    captured = both[0].captured
    assert captured is not None
    for change in (None, changes.overwritten, changes.moved, changes.assigned, changes.adapted):
        held = [one.prefill(one.encode(SEEN[0]), Budget(8), Memory()) for one in both]
        for one in both:
            if change is not None:
                change(one.model)
        mine, theirs = (one.act(own, SEEN[0])[0] for one, own in zip(both, held, strict=True))
        assert np.allclose(mine.actions, theirs.actions, atol=1e-4)
        check(*(episode(one, SEEN, BUDGETS) for one in both), within=1e-4)
        assert captured.pool.fallen_back == []
        assert (captured.pool.captured, captured.pool.uncaptured) == (
            (6 if head == "parallel" else 7),
            0,
        )
