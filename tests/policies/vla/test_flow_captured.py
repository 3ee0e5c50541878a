"""lerobot's flow policies in fixed shapes: the same actions, no waiting, few graphs."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from policies.graphs import standing
from policies.graphs.constants import Constants
from policies.graphs.wanted import Capture
from policies.vla import flow_captured
from policies.vla.families import family_of
from policies.vla.flow import FlowPruning, FlowSteps
from policies.vla.flow_captured import CapturedFlow
from policies.vla.flow_policy import WEIGHTS, FlowPolicy
from stream.data import Budget, Observation
from stream.errors import AttachError
from stream.memory import Memory
from stream.reducers.base import Reducer
from stream.registry import build_reducer, reducer_names
from tests.policies.graphs.taped import TapedPool
from tests.policies.vla import lerobot_models as models
from tests.policies.vla.lerobot_models import BUILDERS, CAMERAS, PER_CAMERA
from tests.policies.vla.overlapped import Overlapped
from tests.policies.vla.test_flow_policy import observed

N = len(CAMERAS) * PER_CAMERA
CAPTURES: tuple[Capture, ...] = ("on", "off")
KINDS = sorted(BUILDERS)
ROUNDING = 1e-4
EYE, SECTIONS, STEPS, CHOICES = 1, 3, 2, 2
"""Graphs of one size of pictures and two budgets: in front of the layer that prunes there is one
length, behind it and in the flow steps there are two. What the prompt looks at is one, and so is
the choice of VLA-Pruner; with all tokens there is nothing to choose."""


@pytest.fixture(scope="module", params=KINDS)
def parts(request: pytest.FixtureRequest) -> Any:
    policy = BUILDERS[request.param]()
    return policy, *models.processors(policy)


def acted(
    policy: FlowPolicy,
    observation: Observation,
    tokens: int,
    memory: Memory | None = None,
    steps: int | None = None,
) -> tuple[Any, Tensor]:
    prefix = policy.prefill(policy.encode(observation), Budget(tokens), memory or Memory())
    chunk, attention = policy.act(prefix, observation, steps, seed=4)
    if memory is not None:
        policy.remember(prefix, attention, memory)
    return chunk.actions, attention


def same(mine: tuple[Any, Tensor], theirs: tuple[Any, Tensor], rounding: float = ROUNDING) -> None:
    """Actions of up to 10, and what they looked at, token by token."""
    assert np.abs(mine[0] - theirs[0]).max() < rounding
    assert (mine[1] - theirs[1]).abs().max() < rounding
    assert torch.equal(mine[1] > 0, theirs[1] > 0)


def both(parts: Any, reducer: Reducer | None = None) -> tuple[FlowPolicy, FlowPolicy]:
    """The same policy in fixed shapes and kernel by kernel."""
    policy, before, after = parts
    fixed, stock = (FlowPolicy(policy, before, after, reducer, capture=c) for c in CAPTURES)
    assert fixed.captured is not None
    assert stock.captured is None
    return fixed, stock


# --- the same actions


@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize("layer", [None, 1, 3, 5])
def test_actions_and_attention_are_the_same(
    parts: Any, layer: int | None, steps: int | None
) -> None:
    fixed, stock = both(parts, build_reducer("vla_pruner", layer=layer))
    memories = Memory(), Memory()
    for tick, cameras in enumerate((CAMERAS, CAMERAS, ("left", "right"), CAMERAS)):
        observation = observed(tick, time_s=tick / 10, cameras=cameras)
        mine, theirs = (
            acted(policy, observation, 9, memory, steps)
            for policy, memory in zip((fixed, stock), memories, strict=True)
        )
        same(mine, theirs)
        assert mine[1].count_nonzero() == 9


def test_all_tokens_give_the_untouched_policys_actions(parts: Any) -> None:
    fixed, _ = both(parts, build_reducer("vla_pruner"))
    policy, before, after = parts
    observation = observed()
    batch = {f"observation.images.{c}": image for c, image in observation.images.items()}
    batch = {k: torch.from_numpy(v).permute(2, 0, 1) / 255 for k, v in batch.items()}
    state = torch.from_numpy(observation.state)
    batch = before(batch | {"observation.state": state, "task": observation.instruction})
    noise = torch.randn(1, models.CHUNK, 8, generator=torch.Generator().manual_seed(4))
    expected = after(policy.predict_action_chunk(batch, noise=noise))[0].numpy()
    for _ in range(2):
        assert np.abs(acted(fixed, observation, N)[0] - expected).max() < ROUNDING


def test_a_prefix_of_two_precisions_is_the_same() -> None:
    """As in SmolVLA's checkpoints, whose language model is of less precision than the state."""
    policy = BUILDERS["smolvla"]()
    policy.model.vlm_with_expert.vlm.half()
    fixed, stock = both((policy, *models.processors(policy)), build_reducer("vla_pruner"))
    observation = observed()
    mine, theirs = (acted(one, observation, 9) for one in (fixed, stock))
    same(mine, theirs)


def test_attention_that_differs_from_token_to_token_is_the_same() -> None:
    """A fresh policy looks everywhere nearly alike, and its norms are all ones."""
    policy = BUILDERS["smolvla"]()
    draw = torch.Generator().manual_seed(0)
    for name, weight in policy.model.vlm_with_expert.named_parameters():
        with torch.no_grad():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(8)
            elif "norm" in name:
                weight.add_(torch.randn(weight.shape, generator=draw) * 0.3)
    fixed, stock = both((policy, *models.processors(policy)), build_reducer("vla_pruner", layer=3))
    mine, theirs = (acted(one, observed(), 9) for one in (fixed, stock))
    seen = theirs[1][theirs[1] > 0]
    assert seen.max() > 3 * seen.min()
    same(mine, theirs)


def test_pictures_between_marks_are_the_same_and_the_marks_stay_on_the_device() -> None:
    policy = BUILDERS["smolvla"](add_image_special_tokens=True)
    fixed, stock = both((policy, *models.processors(policy)), build_reducer("vla_pruner"))
    mark, observation = policy.model.image_end_token, observed(cameras=("left", "right"))
    mine, theirs = (acted(one, observation, 9) for one in (fixed, stock))
    same(mine, theirs)
    family: Any = fixed._family
    near = family._marks["image_end_token"] = mark.clone()
    with family.capturable():
        assert policy.model.image_end_token is near
    assert policy.model.image_end_token is mark


def test_every_reducer_that_fits_acts_the_same(parts: Any) -> None:
    ran = 0
    for name in reducer_names():
        try:
            fixed, stock = both(parts, build_reducer(name))
        except AttachError:
            continue
        ran += 1
        memories = Memory(), Memory()
        for tick in range(2):
            observation = observed(tick, time_s=tick / 10)
            mine, theirs = (
                acted(one, observation, 10, memory, 1)
                for one, memory in zip((fixed, stock), memories, strict=True)
            )
            same(mine, theirs)
    assert ran > 5


def test_prefixes_may_alternate_and_take_in_newer_states(parts: Any) -> None:
    fixed, stock = both(parts, build_reducer("vla_pruner"))
    one, two = observed(1), observed(2)
    newer = replace(one, state=one.state + 1)
    prefixes = [
        [policy.prefill(policy.encode(o), Budget(9), Memory()) for o in (one, two)]
        for policy in (fixed, stock)
    ]
    for which, observation in ((0, one), (1, two), (0, newer), (0, one), (1, newer)):
        mine, theirs = (
            policy.act(own[which], observation, seed=which)
            for policy, own in zip((fixed, stock), prefixes, strict=True)
        )
        same((mine[0].actions, mine[1]), (theirs[0].actions, theirs[1]))


def test_a_call_that_overlaps_another_is_refused(
    parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed, stock = both(parts, build_reducer("vla_pruner", layer=3))
    one, two = observed(1), observed(2)
    scene = fixed.encode(two)
    held = fixed.prefill(scene, Budget(9), Memory())
    calls = [
        lambda: fixed.encode(two),
        lambda: fixed.prefill(scene, Budget(9), Memory()),
        lambda: fixed.act(held, two),
    ]
    expected = acted(stock, one, 9)
    overlapped = Overlapped(calls, monkeypatch)
    mine = acted(fixed, one, 9)
    same(mine, expected)
    overlapped.all_refused()


def test_policies_over_one_network_are_refused_while_one_of_them_runs(
    parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed, _ = both(parts, build_reducer("vla_pruner", layer=3))
    other = fixed.pruned_by(build_reducer("uniform"))
    overlapped = Overlapped([lambda: other.encode(observed(2))], monkeypatch)
    acted(fixed, observed(1), 9)
    overlapped.all_refused()


@pytest.mark.parametrize("kind", ["pi0", "smolvla"])
def test_other_policies_of_a_family_never_see_its_lean_parts(kind: str) -> None:
    """Whichever of two that run at once ends first."""
    one, two = (family_of(BUILDERS[kind]()) for _ in range(2))
    modeling = [sys.modules[type(module).__module__] for module in (one.model, one.towers)]
    before = [dict(vars(module)) for module in modeling]
    first, second = one.capturable(), two.capturable()
    with first:
        second.__enter__()
        assert [dict(vars(module)) for module in modeling] == before
    second.__exit__(None, None, None)
    assert [dict(vars(module)) for module in modeling] == before
    names = {"denoise_step", "forward_attn_layer", "eager_attention_forward"}
    for family in (one, two):
        assert not names & (vars(family.model).keys() | vars(family.towers).keys())


def own_rope(x: Tensor, positions: Tensor) -> Tensor:
    return x * positions[..., None, None].sin()


def own_attention(
    mask: Tensor, batch: int, size: int, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    return query.flatten(2) * mask.sum(-1, keepdim=True)


@pytest.mark.parametrize("where", ["rope", "attention", "class"])
def test_parts_of_a_users_own_are_run(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = BUILDERS["smolvla"]()
    towers = policy.model.vlm_with_expert
    usual = acted(both((policy, *models.processors(policy)))[1], observed(), N)[0]
    if where == "rope":
        modeling = sys.modules[type(towers).__module__]
        monkeypatch.setattr(modeling, "apply_rope", own_rope)
    elif where == "attention":
        monkeypatch.setattr(towers, "eager_attention_forward", own_attention)
    else:
        towers.__class__ = type(
            "Towers",
            (type(towers),),
            {"eager_attention_forward": lambda self, *given: own_attention(*given)},
        )
    fixed, stock = both((policy, *models.processors(policy)), build_reducer("vla_pruner"))
    mine, theirs = (acted(one, observed(), N) for one in (fixed, stock))
    assert np.abs(theirs[0] - usual).max() > 1e-3
    assert np.abs(mine[0] - theirs[0]).max() < ROUNDING


def test_replayed_operators_do_without_python(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "GraphPool", TapedPool)
    fixed, stock = both(parts, build_reducer("vla_pruner", layer=3))
    memories = Memory(), Memory()
    for tick, (tokens, steps) in enumerate(((9, None), (N, 2), (9, 2), (N, None), (9, None))):
        observation = observed(tick, time_s=tick / 10)
        mine, theirs = (
            acted(one, observation, tokens, memory, steps)
            for one, memory in zip((fixed, stock), memories, strict=True)
        )
        same(mine, theirs)
    assert fixed.captured is not None
    assert fixed.captured.pool.captured == EYE + SECTIONS + STEPS + CHOICES


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_captured_flow_steps_do_not_copy_the_cache(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = BUILDERS[kind]()
    modeling, copies = sys.modules[type(policy.model).__module__], []
    clone: Any = vars(modeling)["clone_past_key_values"]

    def counted(cache: Any) -> Any:
        copies.append(cache)
        return clone(cache)

    monkeypatch.setattr(modeling, "clone_past_key_values", counted)
    fixed, stock = both((policy, *models.processors(policy)))
    acted(fixed, observed(), N)
    assert copies == []
    acted(stock, observed(), N)
    assert len(copies) == models.STEPS


def test_a_flow_step_holds_the_prefix_once(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Noted(flow_captured._Step):
        def __init__(self, *given: Any) -> None:
            made.append(self)
            super().__init__(*given)

    monkeypatch.setattr(flow_captured, "_Step", Noted)
    fixed, _ = both(parts)
    acted(fixed, observed(), N)
    (step,) = made
    own = {tensor.data_ptr() for tensor in step._own}
    for layer in step._cache.layers:
        assert {layer.keys.data_ptr(), layer.values.data_ptr()} <= own


# --- few graphs


def test_a_shape_is_captured_once_whatever_the_number_of_steps(parts: Any) -> None:
    fixed, _ = both(parts, build_reducer("vla_pruner"))
    assert fixed.captured is not None
    shapes = fixed.captured.steps
    acted(fixed, observed(1), 9)
    (first,) = shapes.values()
    acted(fixed, observed(2), 9, steps=2)
    assert shapes.values() == [first]
    acted(fixed, observed(1), 20)
    assert len(shapes) == 2
    acted(fixed, observed(1, cameras=("left",)), 9)
    assert len(shapes) == 3
    acted(fixed, observed(3), 9)
    assert len(shapes) == 3
    assert shapes.values()[-1] is first


def test_pruned_otherwise_a_policy_stays_captured_or_not(parts: Any) -> None:
    fixed, stock = both(parts)
    assert fixed.pruned_by(build_reducer("uniform")).captured is not None
    assert stock.pruned_by(build_reducer("uniform")).captured is None
    assert FlowPolicy(*parts).captured is None


def test_a_captured_policy_is_saved_as_it_was(parts: Any, tmp_path: Path) -> None:
    """lerobot refuses weights that are views of others."""
    policy = copy.deepcopy(parts[0])
    policy.save_pretrained(tmp_path / "before")
    acted(FlowPolicy(policy, *parts[1:], capture="on"), observed(), N)
    policy.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


# --- nothing waits for the device


class Watch:
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []


class Made(Watch, TorchFunctionMode):
    """Counts tensors that are made of Python values; torch shortens their way to `meta` tensors."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy):
            self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


class Copied(Watch, TorchDispatchMode):
    """Counts copies from the host to `meta` tensors, whose values nobody can ask for."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = (
            [t.device.type for t in tree_leaves(values) if isinstance(t, Tensor)]
            for values in ((args, kwargs), out)
        )
        if "copy" in str(func) and "cpu" in given and "meta" in given + made:
            self.calls.append(str(func))
        return out


@pytest.fixture
def valueless(parts: Any) -> tuple[CapturedFlow, FlowSteps, list[Any]]:
    """A pruned prefix without values: only its shapes are known."""
    stock = FlowPolicy(*parts, build_reducer("vla_pruner", layer=3), capture="off")
    prefix = stock.prefill(stock.encode(observed()), Budget(9), Memory())
    held = prefix.cache
    policy = copy.deepcopy(parts[0]).to("meta")
    steps = held.inference.anew().steps
    steps.looked = steps.looked.to("meta")
    kept = steps.alive[5]
    assert kept is not None
    kept = kept.to("meta")
    steps.alive = {layer: kept if layer >= 3 else None for layer in steps.alive}
    cache = copy.deepcopy(held.cache)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")
    family = type(stock._family)(policy)
    pruning = FlowPruning(family, build_reducer("vla_pruner", layer=3), look=True)
    beside = [t.to("meta") for t in stock._family.beside(stock._batch(observed(), ()))]
    flow = CapturedFlow(family, pruning, torch.device("meta"))
    return flow, steps, [held.padding.to("meta"), cache, *beside]


@torch.inference_mode()
def test_no_value_is_asked_for_and_none_comes_from_the_host(
    valueless: tuple[CapturedFlow, FlowSteps, list[Any]],
) -> None:
    flow, steps, prefix = valueless
    noise = models.noise().to("meta")
    with Made() as made:
        flow.flow(steps, noise, 2, *prefix)
    assert made.calls
    with Made() as made, Copied() as copied:
        actions = flow.flow(steps, noise, 2, *prefix)
    assert actions.shape == noise.shape
    assert steps.looks == 2 * 3
    assert made.calls == copied.calls == []


class Asked(Watch, TorchDispatchMode):
    """Counts operators that wait for values, on any device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(func)
        selects = "index" in name and any(
            isinstance(t, Tensor) and t.dtype == torch.bool for t in tree_leaves(args[1])
        )
        if selects or any(word in name for word in ("local_scalar", "nonzero", "masked_select")):
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def test_embedding_asks_for_no_value_once_it_has_seen_a_size(parts: Any) -> None:
    fixed, stock = both(parts)
    batch = fixed._batch(observed(), fixed.spec.cameras)
    family, captured = fixed._family, fixed.captured
    assert captured is not None
    pictures, masks = getattr(family.policy, family.pictures)(batch)
    given = (pictures, masks, *family.words(batch))
    captured.embed(*given)
    with Made() as made, Asked() as asked:
        mine = captured.embed(*given)
    assert made.calls == asked.calls == []
    with Made() as made, Asked() as asked:
        theirs = stock._family.embed(*given)
    assert made.calls
    assert bool(asked.calls) == (family.policy.config.type == "smolvla")
    assert (mine[0] - theirs[0]).abs().max() < ROUNDING
    assert all(torch.equal(a, b) for a, b in zip(mine[1:], theirs[1:], strict=True))


def test_the_watch_would_see_what_comes_from_the_host() -> None:
    x = torch.zeros(2, device="meta")
    with Made() as made, Copied() as copied:
        x += torch.tensor([1.0, 2.0]).to("meta")
        x.copy_(torch.ones(2))
    assert len(made.calls) == 1
    assert len(copied.calls) == 2
    with pytest.raises((RuntimeError, NotImplementedError)):
        x.sum().item()
    with Asked() as asked:
        x = torch.ones(2)
        x[x > 0] = x.sum().item()
        x = x[x > 0]
    assert len(asked.calls) == 3


def test_constants_are_of_their_numbers_and_never_of_tensors() -> None:
    with Constants():
        one, same, other = (torch.tensor(value) for value in ([1.0, 2.0], [1.0, 2.0], [1, 2]))
        assert one is same
        assert other.dtype == torch.long
        assert torch.tensor(1.0, dtype=torch.float64).dtype == torch.float64
        x = torch.zeros(1)
        before = torch.tensor([x[0], x[0]])
        x += 1
        assert torch.tensor([x[0], x[0]]).tolist() == [1.0, 1.0]
        assert before.tolist() == [0.0, 0.0]
    assert torch.tensor([1.0, 2.0]) is not one


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_captured_steps_act_as_launched_ones(kind: str) -> None:
    policy = BUILDERS[kind]().to("cuda")
    policy.config.device = "cuda"
    parts = policy, *models.processors(policy)
    for layer in (None, 3):
        fixed, stock = both(parts, build_reducer("vla_pruner", layer=layer))
        memories = Memory(), Memory()
        assert fixed.captured is not None
        for tick, (tokens, steps) in enumerate(((9, None), (9, 2), (N, None), (9, None))):
            observation = observed(tick, time_s=tick / 10)
            mine, theirs = (
                acted(one, observation, tokens, memory, steps)
                for one, memory in zip((fixed, stock), memories, strict=True)
            )
            same(mine, theirs)
        assert fixed.captured.pool.fallen_back == []
        assert fixed.captured.pool.captured == EYE + (SECTIONS if layer else 2) + STEPS + CHOICES
