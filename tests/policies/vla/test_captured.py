"""OpenVLA-shaped policies in fixed shapes do what they do as they stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from policies.graphs import standing
from policies.graphs.capture import GraphPool, Program
from policies.graphs.staged import Prefilled
from policies.graphs.wanted import Capture
from policies.vla import captured
from policies.vla.openvla import OpenVLAPolicy
from sims.calibration import warm
from stream.data import Budget, Observation
from stream.memory import Memory
from stream.plan import Plan
from stream.reducers.vla_cache import VLACache
from stream.reducers.vla_pruner import VLAPruner
from stream.registry import build_reducer
from tests.policies.graphs.taped import TapedPool
from tests.policies.vla.openvla_parts import observation, policy
from tests.policies.vla.overlapped import Overlapped

CAPTURES: tuple[Capture, ...] = ("on", "off")
HEADS = ("parallel", "autoregressive")
REDUCERS: list[tuple[str, dict[str, Any]]] = [
    ("identity", {}),
    ("vla_pruner", {"layer": 2}),
    ("vla_pruner", {"layer": None}),
    ("vla_pruner", {"layer": 2, "mode": "paper"}),
    ("vla_pruner", {"layer": 2, "mode": "released"}),
    ("vla_pruner", {"layer": 3}),  # among the action layers: acted from as it stands
    ("fastv", {"layer": 1}),
    ("vla_cache", {}),
]


@dataclass(frozen=True)
class Step:
    actions: Tensor
    attention: Tensor
    relevance: Tensor
    plan: Plan
    tokens: int


def episode(one: OpenVLAPolicy, seen: Sequence[Observation], budgets: Sequence[int]) -> list[Step]:
    memory, steps = Memory(), []
    for observed, tokens in zip(seen, budgets, strict=True):
        scene = one.encode(observed)
        prefix = one.prefill(scene, Budget(min(tokens, scene.grid.size)), memory)
        chunk, attention = one.act(prefix, observed)
        one.remember(prefix, attention, memory)
        (relevance,) = scene.signals.values()
        actions = torch.from_numpy(chunk.actions)
        steps.append(Step(actions, attention.cpu(), relevance.cpu(), prefix.plan, prefix.tokens))
    return steps


def check(fixed: list[Step], stock: list[Step], within: float = 1e-5) -> None:
    for one, other in zip(fixed, stock, strict=True):
        assert torch.allclose(one.relevance, other.relevance, atol=within)
        assert one.plan.same_as(other.plan)
        assert one.tokens == other.tokens
        assert torch.allclose(one.actions, other.actions, atol=within)
        assert torch.allclose(one.attention, other.attention, atol=within)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("name", "settings"), REDUCERS)
def test_an_episode_is_the_same(head: str, name: str, settings: dict[str, Any]) -> None:
    reducer = build_reducer(name, **settings)
    missing = (None, None, None, None, "wrist", None, "scene")
    seen = [observation(i, text=i % 2, missing=m, time_s=0.1 * i) for i, m in enumerate(missing)]
    budgets = (8, 8, 32, 5, 8, 1, 8)
    fixed, stock = policy(head, reducer, "on"), policy(head, reducer, "off")
    check(episode(fixed, seen, budgets), episode(stock, seen, budgets))


@pytest.mark.parametrize("head", HEADS)
def test_one_camera_and_no_state(head: str) -> None:
    changes: dict[str, Any] = {
        "cameras": ["wrist"],
        "state_size": 0,
        "state_mean": [],
        "state_std": [],
    }
    seen = [observation(i, time_s=0.1 * i) for i in range(3)]
    reducer = VLAPruner(layer=1)
    both = [policy(head, reducer, capture, **changes) for capture in CAPTURES]
    check(*(episode(one, seen, (16, 4, 4)) for one in both))


def test_shapes_are_built_once_and_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    chosen = {"What a reducer chooses"}
    init = Program.__init__

    def counted(self: Program, pool: GraphPool, name: str, *given: Any) -> None:
        built.append(name)
        init(self, pool, name, *given)

    monkeypatch.setattr(Program, "__init__", counted)
    one = policy("autoregressive", VLAPruner(layer=2), capture="on")
    other = one.pruned_by(VLAPruner(layer=2, mode="paper"))
    seen = [observation(i, text=i % 2, time_s=0.1 * i) for i in range(6)]
    episode(one, seen[:4], (8, 32, 20, 16))
    # the encoders, layers 0 and 1, layers 2 and 3 for each budget, the first rows, one more row
    layers = [name for name in built if name not in chosen]
    assert len(layers) == len(set(layers)) == 1 + 1 + 4 + 2
    assert len(built) == len(layers) + 3, "with all tokens there is nothing to choose"
    episode(other, seen[:4], (8, 32, 20, 16))
    assert [name for name in built[11:] if name not in chosen] == []
    now = len(built)
    episode(one, seen, (8, 32, 20, 16, 3, 8))
    (layer,) = [name for name in built[now:] if name not in chosen]
    assert f"{1 + 3 + 31} tokens" in layer
    assert len(built) == now + 2


@pytest.mark.parametrize("head", HEADS)
def test_prefixes_of_two_episodes_are_acted_from_in_any_order(head: str) -> None:
    one, stock = (policy(head, VLAPruner(layer=2), capture) for capture in CAPTURES)
    seen = [observation(i, time_s=0.1 * i) for i in range(4)]
    prefixes, expected = [], []
    for i, observed in enumerate(seen):
        scene, budget = one.encode(observed), Budget((8, 8, 32, 5)[i])
        prefixes.append(one.prefill(scene, budget, Memory()))
        expected.append(stock.act(stock.prefill(scene, budget, Memory()), observed))
    assert all(isinstance(prefix.cache.cache, Prefilled) for prefix in prefixes)
    for i in (3, 0, 1, 1, 3, 2, 0):
        chunk, attention = one.act(prefixes[i], seen[i])
        assert np.abs(chunk.actions - expected[i][0].actions).max() < 1e-5
        assert torch.allclose(attention, expected[i][1], atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("name", "settings"), REDUCERS)
def test_replayed_operators_do_without_python(
    head: str, name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standing, "GraphPool", TapedPool)
    fixed, stock = (policy(head, build_reducer(name, **settings), c) for c in CAPTURES)
    assert fixed.captured is not None
    budgets = (8, 32, 8, 5, 8, 5)
    graphs = []
    for first in (0, 10):
        seen = [observation(first + i, text=i % 2, time_s=0.1 * i) for i in range(6)]
        check(episode(fixed, seen, budgets), episode(stock, seen, budgets))
        graphs.append(fixed.captured.pool.captured)
    assert graphs[0] == graphs[1] > 0


def test_instructions_of_different_lengths_are_acted_from_as_they_stand() -> None:
    one = policy("parallel", VLAPruner(layer=2), capture="on")
    assert one.captured is not None
    seen = [observation(i, text=i) for i in range(2)]
    prefixes = one.prefill_batch(one.encode_batch(seen), Budget(8), [Memory(), Memory()], [0, 0])
    chunks, _ = one.act_batch(prefixes, seen)
    assert not one.captured.decoders
    for chunk, observed in zip(chunks, seen, strict=True):
        (alone,) = episode(one, [observed], [8])
        assert np.abs(chunk.actions - alone.actions.numpy()).max() < 1e-5
    assert len(one.captured.decoders) == 1


def test_of_many_shapes_the_longest_unused_goes() -> None:
    one, stock = (policy("parallel", VLAPruner(layer=2), capture) for capture in CAPTURES)
    assert one.captured is not None
    held = []
    for batch in (1, 2, 3, 1, 4, 5, 6):
        seen = [observation(10 * batch + i) for i in range(batch)]
        given = Budget(8), [Memory() for _ in seen], [0] * batch
        held.append((seen, *(p.prefill_batch(p.encode_batch(seen), *given) for p in (one, stock))))
        assert len(one.captured.decoders) <= captured.DECODERS
    assert [batch for batch, _, _ in one.captured.decoders] == [1, 4, 5, 6]
    for seen, mine, theirs in held:
        expected, looked = stock.act_batch(theirs, seen)
        chunks, attention = one.act_batch(mine, seen)
        for chunk, other in zip(chunks, expected, strict=True):
            assert np.abs(chunk.actions - other.actions).max() < 1e-5
        assert torch.allclose(attention, looked, atol=1e-5)


def test_a_call_that_overlaps_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies pruned otherwise share the buffers."""
    one, stock = (policy("parallel", VLAPruner(layer=2), capture) for capture in CAPTURES)
    other, seen = one.pruned_by(VLAPruner(layer=2, mode="paper")), observation(1)
    scene = other.encode(seen)
    held = other.prefill(scene, Budget(8), Memory())
    calls = [
        lambda: other.encode(seen),
        lambda: other.prefill(scene, Budget(8), Memory()),
        lambda: other.act(held, seen),
    ]
    expected = episode(stock, [observation(2)], [8])
    overlapped = Overlapped(calls, monkeypatch)
    check(episode(one, [observation(2)], [8]), expected)
    overlapped.all_refused()


@pytest.mark.parametrize("head", HEADS)
def test_behind_a_warm_start_nothing_is_captured(
    head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standing, "GraphPool", TapedPool)
    one, stock = (policy(head, VLAPruner(layer=2), capture) for capture in CAPTURES)
    assert one.captured is not None
    warm(one, observation(), (8, 32))
    pool = one.captured.pool
    graphs, seen = pool.captured, [observation(i, time_s=0.1 * i) for i in range(4)]
    check(episode(one, seen, (8, 32, 8, 8)), episode(stock, seen, (8, 32, 8, 8)))
    assert (pool.captured, pool.uncaptured) == (graphs, 0)
    seen = [observation(i, missing="wrist", time_s=0.1 * i) for i in range(4)]
    check(episode(one, seen, (8, 16, 8, 5)), episode(stock, seen, (8, 16, 8, 5)))
    assert pool.captured == graphs > 0
    assert pool.uncaptured > 0


def test_capturing_is_for_cuda_unless_it_is_asked_for() -> None:
    assert policy("parallel").captured is None
    assert policy("parallel", capture="off").captured is None
    assert policy("parallel", capture="on").captured is not None


@pytest.mark.gpu
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("reducer", [VLAPruner(layer=2), VLAPruner(layer=None), VLACache()])
def test_graphs_act_as_the_network_does(head: str, reducer: Any) -> None:
    seen = [observation(i, text=i % 2, time_s=0.1 * i) for i in range(6)]
    budgets = (8, 8, 32, 8, 5, 8)
    both = [policy(head, reducer, capture, device="cuda") for capture in CAPTURES]
    check(*(episode(one, seen, budgets) for one in both), within=1e-4)
    assert both[0].captured is not None
    pool = both[0].captured.pool
    graphs = pool.captured
    assert graphs > 0
    assert pool.fallen_back == []
    check(*(episode(one, seen, budgets) for one in both), within=1e-4)
    assert pool.captured == graphs
