"""lerobot's flow policies in three phases, and from a folder."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import policies.vla
from policies.attach import attach
from policies.vla.flow_policy import FlowPolicy
from stream.data import ActionChunk, Budget, Observation
from stream.errors import AttachError, ConfigError, ValueShapeError
from stream.memory import Memory
from stream.ops.history import AttentionHistory
from stream.reducers.base import Reducer
from stream.reducers.vla_pruner import STATE, begin_episode
from stream.registry import build_reducer
from tests.policies.vla import lerobot_models as models
from tests.policies.vla.lerobot_models import BUILDERS, CAMERAS, PER_CAMERA

N = len(CAMERAS) * PER_CAMERA
KINDS = sorted(BUILDERS)


@pytest.fixture(scope="module", params=KINDS)
def parts(request: pytest.FixtureRequest) -> Any:
    policy = BUILDERS[request.param]()
    return policy, *models.processors(policy)


def built(parts: Any, reducer: Reducer | None = None) -> FlowPolicy:
    policy, before, after = parts
    return FlowPolicy(policy, before, after, reducer)


def pruner(**settings: Any) -> Reducer:
    return build_reducer("vla_pruner", **settings)


def observed(seed: int = 0, time_s: float = 0.0, cameras: tuple[str, ...] = CAMERAS) -> Observation:
    rng = np.random.default_rng(seed)
    pictures = {c: rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for c in CAMERAS}
    return Observation(
        images={c: pictures[c] if c in cameras else None for c in CAMERAS},
        state=rng.standard_normal(models.STATE).astype(np.float32),
        instruction="reach the red ball",
        time_s=time_s,
    )


def acted(
    policy: FlowPolicy, observation: Observation, tokens: int, memory: Memory | None = None
) -> ActionChunk:
    scene = policy.encode(observation)
    prefix = policy.prefill(scene, Budget(tokens), memory or Memory())
    return policy.act(prefix, observation, seed=4)[0]


def by_lerobot(parts: Any, observation: Observation, tokens: int | None) -> Any:
    """What lerobot's own call gives for the same noise, attached or as it is."""
    policy, before, after = parts
    batch = {f"observation.images.{c}": image for c, image in observation.images.items()}
    batch = {k: torch.from_numpy(v).permute(2, 0, 1) / 255 for k, v in batch.items()}
    state = torch.from_numpy(observation.state)
    batch = before(batch | {"observation.state": state, "task": observation.instruction})
    noise = torch.randn(1, models.CHUNK, 8, generator=torch.Generator().manual_seed(4))
    with attach(policy, pruner(), budget=tokens) if tokens else nullcontext():
        return after(policy.predict_action_chunk(batch, noise=noise))[0].numpy()


# --- three phases


@pytest.mark.parametrize("tokens", [None, 9])
def test_three_phases_are_lerobots_one(parts: Any, tokens: int | None) -> None:
    observation = observed()
    expected = by_lerobot(parts, observation, tokens)
    chunk = acted(built(parts, pruner()), observation, tokens or N)
    assert np.array_equal(chunk.actions, expected)


def test_one_policy_may_be_pruned_in_several_ways(parts: Any) -> None:
    whole = built(parts)
    unpruned = acted(whole, observed(), N).actions
    with attach(whole, "vla_pruner", budget=9) as held:
        chunk = held.act(observed(), seed=4)
        assert held.plan.k == 9
        assert np.array_equal(acted(whole, observed(), N).actions, unpruned)
    assert np.array_equal(chunk.actions, acted(built(parts, pruner()), observed(), 9).actions)
    assert not np.array_equal(chunk.actions, unpruned)


def test_the_spec_says_what_the_policy_is(parts: Any) -> None:
    spec = built(parts).spec
    assert spec.cameras == CAMERAS
    assert (spec.grid.frames, spec.grid.per_frame) == (3, PER_CAMERA)
    assert (spec.chunk, spec.execute) == (models.CHUNK, models.CHUNK // 2)
    assert (spec.action_size, spec.state_size) == (models.ACTION, models.STATE)
    assert spec.steps == (1, 2, 3, 4)


@pytest.mark.parametrize("layer", [None, 3])
def test_a_prefix_can_be_acted_from_again(parts: Any, layer: int | None) -> None:
    policy = built(parts, pruner(layer=layer))
    one, two = observed(1), observed(2)
    first = policy.prefill(policy.encode(one), Budget(9), Memory())
    before, attention = policy.act(first, one, seed=4)
    second = policy.prefill(policy.encode(two), Budget(20), Memory())
    policy.act(second, two, seed=5)
    policy.act(first, one, seed=5)
    again, same = policy.act(first, one, seed=4)
    assert np.array_equal(before.actions, again.actions)
    assert torch.equal(attention, same)
    assert not np.array_equal(policy.act(first, one, seed=5)[0].actions, before.actions)
    assert first.tokens == first.plan.k == 9


def test_fewer_flow_steps_are_the_policys_own(parts: Any) -> None:
    observation = observed()
    policy, config = built(parts, pruner()), parts[0].config
    prefix = policy.prefill(policy.encode(observation), Budget(N), Memory())
    chunk, _ = policy.act(prefix, observation, steps=2, seed=4)
    name = "num_steps" if config.type == "smolvla" else "num_inference_steps"
    setattr(config, name, 2)
    try:
        assert np.array_equal(chunk.actions, by_lerobot(parts, observation, None))
    finally:
        setattr(config, name, models.STEPS)
    with pytest.raises(ConfigError, match=r"steps is 7; .* takes \(1, 2, 3, 4\)"):
        policy.act(prefix, observation, steps=7)


def test_an_old_prefix_takes_in_a_newer_state_where_the_state_is_not_in_it(parts: Any) -> None:
    policy = built(parts, pruner())
    old = observed(1, time_s=1.0)
    new = replace(old, state=old.state + 1, time_s=2.0)
    prefix = policy.prefill(policy.encode(old), Budget(9), Memory())
    by_old, by_new = (policy.act(prefix, o, seed=4)[0] for o in (old, new))
    assert by_new.observed_s == 1.0
    assert np.array_equal(by_old.actions, by_new.actions) == (parts[0].config.type != "pi0")


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_relative_actions_start_from_the_state_that_the_policy_knew(kind: str) -> None:
    policy = BUILDERS[kind](use_relative_actions=True, relative_exclude_joints=[])
    parts = policy, *models.processors(policy)
    old = observed(1)
    new = replace(observed(2), state=old.state + 1)
    pruned = built(parts, pruner())
    prefix = pruned.prefill(pruned.encode(old), Budget(9), Memory())
    before = pruned.act(prefix, old, seed=4)[0].actions
    assert np.array_equal(before, by_lerobot(parts, old, 9))
    pruned.encode(new)
    assert np.array_equal(pruned.act(prefix, old, seed=4)[0].actions, before)


def test_attention_is_of_the_tokens_that_are_left(parts: Any) -> None:
    policy = built(parts)
    for reducer in (pruner(), build_reducer("uniform")):
        policy = built(parts, reducer)
        prefix = policy.prefill(policy.encode(observed()), Budget(9), Memory())
        _, attention = policy.act(prefix, observed())
        assert attention.shape == (N,)
        assert attention.nonzero().squeeze(-1).tolist() == prefix.plan.anchor.tolist()


def test_memory_fills_and_an_older_epoch_does_not_enter(parts: Any) -> None:
    policy, memory = built(parts, pruner()), Memory()
    for tick in range(2):
        observation = observed(tick, time_s=tick / 10)
        prefix = policy.prefill(policy.encode(observation), Budget(9), memory)
        policy.remember(prefix, policy.act(prefix, observation)[1], memory)
    history: AttentionHistory = memory.state[STATE]
    assert [g.time_s for g in history.glances] == [0.0, 0.1]
    assert history.glances[-1].seen.nonzero().squeeze(-1).tolist() == prefix.plan.anchor.tolist()
    assert memory.tick == 2
    memory.reset()
    begin_episode(memory, 1)
    policy.remember(prefix, policy.act(prefix, observation)[1], memory)
    assert memory.state[STATE].pushed == 0


def test_a_camera_may_drop_out_and_return(parts: Any) -> None:
    policy, memory = built(parts, pruner()), Memory()
    for tick, cameras in enumerate((CAMERAS, ("left", "right"), CAMERAS)):
        observation = observed(tick, time_s=tick / 10, cameras=cameras)
        scene = policy.encode(observation)
        assert scene.cameras == cameras
        assert scene.grid.size == scene.x.shape[0] == len(cameras) * PER_CAMERA
        prefix = policy.prefill(scene, Budget(9), memory)
        assert prefix.plan.n == scene.grid.size
        chunk, attention = policy.act(prefix, observation)
        assert attention.shape == (scene.grid.size,)
        policy.remember(prefix, attention, memory)
        assert np.isfinite(chunk.actions).all()
    middle = memory.state[STATE].glances[1].seen.view(3, -1)
    assert middle.any(-1).tolist() == [True, False, True]


def test_observations_of_another_robot_are_errors(parts: Any) -> None:
    policy = built(parts)
    with pytest.raises(ValueShapeError, match="needs at least one of left, wrist, right"):
        policy.encode(observed(cameras=()))
    other = replace(observed(), state=np.zeros(2, dtype=np.float32))
    with pytest.raises(ValueShapeError, match=r"has 2 numbers, .* was trained on 5"):
        policy.encode(other)


# --- from a folder


@pytest.fixture(scope="module", params=["pi0", "smolvla"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    policy = BUILDERS[request.param]()
    where: Path = tmp_path_factory.mktemp(request.param)
    for part in (policy, *models.processors(policy)):
        part.save_pretrained(where)
    return where


def loading(folder: Path, reducer: Reducer | None = None) -> Any:
    kind = "pi0" if "pi0" in folder.name else "smolvla"
    with models.local_tokenizer(), models.thin_pi("pi0") if kind == "pi0" else nullcontext():
        return policies.vla.load(str(folder), reducer, "cpu")


def test_a_checkpoint_folder_acts_as_the_policy_that_was_saved(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = BUILDERS["pi0" if "pi0" in folder.name else "smolvla"]()
    expected = by_lerobot((saved, *models.processors(saved)), observed(), 9)
    capsys.readouterr()
    policy = loading(folder, pruner())
    assert capsys.readouterr().out == ""
    assert not torch.backends.cuda.matmul.allow_tf32, "on a CPU nothing is to be set"
    assert np.array_equal(acted(policy, observed(), 9).actions, expected)


def test_broken_weights_are_an_error_and_never_random_ones(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    where = tmp_path.rename(tmp_path.with_name(f"broken-{folder.name}"))
    (where / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(AttachError, match="cannot be loaded"):
        loading(where)
    (where / "model.safetensors").unlink()
    with pytest.raises(AttachError, match="cannot be loaded"):
        loading(where)


def test_what_is_no_policy_is_named(tmp_path: Path) -> None:
    with pytest.raises(AttachError, match="There is no policy"):
        policies.vla.load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"type": "act"}')
    with pytest.raises(AttachError, match=r"'act' model; robot policies are .*pi0, pi05, smolvla"):
        policies.vla.load(str(tmp_path))
    with pytest.raises(AttachError, match="There is no policy 'nobody/nothing'"):
        policies.vla.load("nobody/nothing")
