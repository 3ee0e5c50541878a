"""OpenVLA-shaped policies: pruned runs against the untouched network, its mask oracle, and time."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from policies.attach import attach
from policies.graphs.wanted import Capture
from policies.vla import load
from policies.vla.openvla import OpenVLAPolicy
from policies.vla.openvla_model import OpenVLA, openvla_7b
from stream.data import Budget, Observation
from stream.errors import AttachError, BudgetError, ConfigError, ValueShapeError
from stream.memory import Memory
from stream.reducers.vla_pruner import STATE, VLAPruner, begin_episode
from stream.registry import build_reducer
from tests.policies.vla.openvla_parts import (
    DINOV2,
    LAYERS,
    SIGLIP,
    TEXTS,
    hidden_from,
    network,
    observation,
    policy,
)

HEADS = ("parallel", "autoregressive")
WHOLE = Budget(32)
PRUNERS = [
    ("vla_pruner", {"layer": 2}),
    ("vla_pruner", {"layer": None}),
    ("vla_pruner", {"mode": "paper", "layer": 2}),
    ("fastv", {"layer": 1}),
    ("divprune", {"layer": 2}),
    ("random_keep", {}),
    ("uniform", {}),
]


@torch.inference_mode()
def plainly(one: OpenVLAPolicy, seen: Observation, text: int = 0) -> Tensor:
    """Actions of the bare network, [chunk, a], with nothing attached."""
    model = one.model
    images = torch.stack([torch.from_numpy(i) for i in seen.images.values() if i is not None])
    visual = model.see(images, torch.arange(len(images))).flatten(0, 1)
    words = model.words(torch.tensor(one.tokenizer(TEXTS[text]).input_ids))
    rows = torch.cat([words[:1], visual, words[1:]])[None]
    cache, n = DynamicCache(), rows.shape[1]
    model.decode(rows, cache, torch.arange(n)[None], None)
    state = (torch.from_numpy(seen.state) - torch.tensor([0.1, 0.2, 0.3, 0.4])) / torch.tensor(
        [1.0, 2.0, 1.0, 0.5]
    )
    rows = torch.cat([model.state_row(state[None]), model.query_rows(1)], dim=1)
    hidden = model.decode(rows, cache, torch.arange(n, n + rows.shape[1])[None], None)
    if model.is_parallel:
        actions = model.action_head(hidden[:, 1:])[0]
    else:
        bins = [model.action_head(hidden[:, -1]).argmax(-1)]
        for i in range(5):
            row = model.bin_rows(bins[-1])[:, None]
            hidden = model.decode(row, cache, torch.tensor([[n + 2 + i]]), None)
            bins.append(model.action_head(hidden[:, -1]).argmax(-1))
        actions = model.from_bins(torch.cat(bins)).view(3, 2)
    low, high = torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 4.0])
    return (actions + 1) / 2 * (high - low) + low


def run(one: OpenVLAPolicy, seen: Observation, budget: Budget, memory: Memory) -> np.ndarray:
    prefix = one.prefill(one.encode(seen), budget, memory)
    chunk, attention = one.act(prefix, seen)
    one.remember(prefix, attention, memory)
    return chunk.actions


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("name", "settings"), PRUNERS)
def test_keeping_all_is_bit_equal_to_the_bare_network(head: str, name: str, settings: dict) -> None:
    one = policy(head, build_reducer(name, **settings))
    seen = observation()
    expected = plainly(one, seen).numpy()
    assert np.array_equal(run(one, seen, WHOLE, Memory()), expected)
    assert np.array_equal(plainly(one, seen).numpy(), expected)


@pytest.mark.parametrize("capture", ["off", "on"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("name", "settings"), PRUNERS)
def test_dropping_equals_the_mask_oracle(
    head: str, name: str, settings: dict, capture: Capture
) -> None:
    reducer = build_reducer(name, **settings)
    one, memory = policy(head, reducer, capture), Memory()
    for step in range(4):
        seen = observation(step, time_s=0.1 * step)
        prefix = one.prefill(one.encode(seen), Budget(8), memory)
        chunk, attention = one.act(prefix, seen)
        one.remember(prefix, attention, memory)
    assert prefix.plan.k == prefix.tokens == 8
    gone = torch.tensor([1 + i for i in range(32) if i not in prefix.plan.anchor.tolist()])
    layer = reducer.site.layer_index(LAYERS) if reducer.site.in_llm else 0
    with hidden_from(one.model, layer, gone):
        expected = plainly(one, seen)
    assert np.abs(chunk.actions - expected.numpy()).max() < 1e-5
    assert (attention[[g - 1 for g in gone.tolist()]] == 0).all()
    assert (attention[prefix.plan.anchor] > 0).all()


@pytest.mark.parametrize("capture", ["off", "on"])
@pytest.mark.parametrize("head", HEADS)
def test_a_batch_equals_its_episodes_one_by_one(head: str, capture: Capture) -> None:
    one = policy(head, VLAPruner(layer=2), capture)
    alone, together = [Memory(seed=i) for i in range(3)], [Memory(seed=i) for i in range(3)]
    for step in range(3):
        seen = [observation(10 * step + i, text=i % 2, time_s=0.1 * step) for i in range(3)]
        prefixes = one.prefill_batch(one.encode_batch(seen), Budget(8), together, [0] * 3)
        chunks, attention = one.act_batch(prefixes, seen)
        for prefix, looked, memory in zip(prefixes, attention, together, strict=True):
            one.remember(prefix, looked, memory)
        for i, memory in enumerate(alone):
            prefix = one.prefill(one.encode(seen[i]), Budget(8), memory)
            chunk, looked = one.act(prefix, seen[i])
            one.remember(prefix, looked, memory)
            assert prefix.plan.same_as(prefixes[i].plan)
            assert np.abs(chunk.actions - chunks[i].actions).max() < 1e-5
            assert torch.allclose(looked, attention[i], atol=1e-5)


@pytest.mark.parametrize("capture", ["off", "on"])
def test_interleaved_episodes_do_not_touch_each_other(capture: Capture) -> None:
    one = policy("parallel", VLAPruner(layer=2), capture)
    alone = [[run(one, observation(10 * e + s), Budget(8), m) for s in range(4)]
             for e, m in enumerate((Memory(), Memory()))]  # fmt: skip
    memories = Memory(), Memory()
    for step in range(4):
        for episode in range(2):
            actions = run(one, observation(10 * episode + step), Budget(8), memories[episode])
            assert np.array_equal(actions, alone[episode][step])


@pytest.mark.parametrize("capture", ["off", "on"])
@pytest.mark.parametrize("head", HEADS)
def test_a_missing_camera_equals_a_hidden_one(head: str, capture: Capture) -> None:
    one = policy(head, capture=capture)
    for missing, first in (("scene", 1), ("wrist", 17)):
        seen = observation(missing=missing)
        scene = one.encode(seen)
        assert (scene.x.shape[0], scene.grid.size) == (16, 16)
        actions = run(one, seen, Budget(16), Memory())
        with hidden_from(one.model, 0, torch.arange(first, first + 16)):
            expected = plainly(one, observation())
        assert np.abs(actions - expected.numpy()).max() < 1e-5


@pytest.mark.parametrize("capture", ["off", "on"])
def test_a_camera_that_drops_out_and_returns_keeps_its_past(capture: Capture) -> None:
    one, memory = policy("parallel", VLAPruner(layer=2), capture), Memory()
    for step, missing in enumerate((None, "wrist", None)):
        seen = observation(step, missing=missing, time_s=0.1 * step)
        prefix = one.prefill(one.encode(seen), Budget(8), memory)
        _, attention = one.act(prefix, seen)
        one.remember(prefix, attention, memory)
        assert prefix.plan.k == 8
        assert attention.numel() == prefix.plan.n == prefix.grid.size
    glances = memory.state[STATE].glances
    assert [int(g.seen.sum()) for g in glances] == [8, 8, 8]
    assert not glances[1].seen[16:].any()


def test_an_inference_from_before_a_reset_is_not_remembered() -> None:
    one, memory = policy("parallel", VLAPruner(layer=2)), Memory()
    begin_episode(memory, 0)
    seen = observation()
    prefix = one.prefill(one.encode(seen), Budget(8), memory, epoch=0)
    _, attention = one.act(prefix, seen)
    memory.reset()
    begin_episode(memory, 1)
    one.remember(prefix, attention, memory)
    assert memory.state[STATE].glances == ()


@pytest.mark.parametrize("capture", ["off", "on"])
@pytest.mark.parametrize("head", HEADS)
def test_a_prefix_can_be_acted_from_again_with_a_newer_state(head: str, capture: Capture) -> None:
    one = policy(head, VLAPruner(layer=2), capture)
    seen = observation()
    newer = Observation(seen.images, seen.state + 1, seen.instruction, 0.1)
    prefix = one.prefill(one.encode(seen), Budget(8), Memory())
    first, _ = one.act(prefix, seen)
    later, _ = one.act(prefix, newer)
    again, _ = one.act(prefix, seen)
    assert np.array_equal(first.actions, again.actions)
    assert not np.array_equal(first.actions, later.actions)
    assert np.array_equal(later.actions, run(one, newer, Budget(8), Memory()))


@pytest.mark.parametrize("head", HEADS)
def test_the_training_pass_decodes_the_same(head: str) -> None:
    one, texts = policy(head), one_batch(policy(head))
    seen = [observation(i, text=i) for i in range(2)]
    prefixes = one.prefill_batch(one.encode_batch(seen), WHOLE, [Memory(), Memory()], [0, 0])
    chunks, _ = one.act_batch(prefixes, seen)
    actions = torch.from_numpy(np.stack([chunk.actions for chunk in chunks]))
    actions = (actions - torch.tensor([-1.0, -2.0])) / torch.tensor([2.0, 6.0]) * 2 - 1
    state = torch.from_numpy(np.stack([s.state for s in seen]))
    state = (state - one._state_mean) / one._state_std
    visual = torch.stack([scene.x for scene in one.encode_batch(seen)])
    with torch.inference_mode():
        said = one.model.action_head(one.model(visual, *texts, state, actions))
    if head == "parallel":
        assert torch.allclose(said, actions, atol=1e-5)
    else:
        assert torch.equal(said.argmax(-1), one.model.to_bins(actions).flatten(1))


def one_batch(one: OpenVLAPolicy) -> tuple[Tensor, Tensor]:
    encoded = one.tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    return encoded.input_ids, encoded.attention_mask.sum(-1) - 1


def test_bins_and_their_middles() -> None:
    model = network("autoregressive")
    bins = torch.arange(256)
    assert torch.equal(model.to_bins(model.from_bins(bins)), bins)
    assert model.to_bins(torch.tensor([-3.0, -1.0, 1.0, 3.0])).tolist() == [0, 0, 255, 255]


def test_fused_encoders_and_a_picture_of_another_size() -> None:
    one = policy(
        "parallel", vision_configs=[DINOV2, SIGLIP], state_size=0, state_mean=[], state_std=[]
    )
    rng = np.random.default_rng(0)
    images = {c: rng.integers(0, 256, (40, 48, 3), dtype=np.uint8) for c in one.spec.cameras}
    seen = Observation(images, np.zeros(0, np.float32), TEXTS[0], 0.0)
    assert run(one, seen, WHOLE, Memory()).shape == (3, 2)
    assert one.model.projector[0].in_features == 16 + 24


def test_a_network_can_be_copied_to_another_process() -> None:
    model = network("parallel")
    copy = pickle.loads(pickle.dumps(model))
    images = torch.zeros(1, model.config.image_px, model.config.image_px, 3)
    first = torch.zeros(1, dtype=torch.long)
    assert torch.equal(copy.see(images, first), model.see(images, first))


def test_the_7b_shapes_are_openvlas() -> None:
    with torch.device("meta"):
        model = OpenVLA(openvla_7b())
    assert 7.3e9 < sum(p.numel() for p in model.parameters()) < 7.7e9
    assert model.visual_tokens == 256


def test_what_is_refused() -> None:
    one = policy("parallel")
    seen = observation()
    blind = Observation(dict.fromkeys(seen.images), seen.state, TEXTS[0], 0.0)
    with pytest.raises(ValueShapeError, match="No camera gave a picture"):
        one.encode(blind)
    with pytest.raises(ValueShapeError, match="holds NaN"):
        Observation(seen.images, np.full(4, np.nan, np.float32), TEXTS[0], 0.0)
    with pytest.raises(ValueShapeError, match="trained on 4"):
        one.encode(Observation(seen.images, np.zeros(3, np.float32), TEXTS[0], 0.0))
    scenes = one.encode_batch([seen, observation(missing="wrist")])
    with pytest.raises(ValueShapeError, match="same cameras"):
        one.prefill_batch(scenes, WHOLE, [Memory(), Memory()], [0, 0])
    prefixes = one.prefill_batch([scenes[0]] * 2, WHOLE, [Memory(), Memory()], [0, 0])
    with pytest.raises(AttachError, match="one `prefill_batch`"):
        one.act(prefixes[1], seen)
    with pytest.raises(ConfigError, match="steps is 5"):
        one.act(prefixes[0], seen, steps=5)
    with pytest.raises(AttachError, match="cannot give saliency"):
        one.pruned_by(build_reducer("saliency"))


def test_broken_weights_never_reach_a_robot() -> None:
    one = policy("parallel")
    with torch.no_grad():
        one.model.action_head[-1].bias.fill_(torch.nan)
    with pytest.raises(ValueShapeError, match="NaN or infinite actions"):
        run(one, observation(), WHOLE, Memory())


def test_a_folder_gives_the_same_policy_back(tmp_path: Path) -> None:
    one = policy("autoregressive")
    one.model.save_pretrained(tmp_path, max_shard_size="50KB")
    one.tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again: Any = load(str(tmp_path), device="cpu")
    seen = observation(text=1)
    assert again.spec.cameras == ("scene", "wrist")
    assert np.array_equal(run(one, seen, WHOLE, Memory()), run(again, seen, WHOLE, Memory()))
    with pytest.raises(AttachError, match="There is no policy"):
        load(str(tmp_path / "nothing"), device="cpu")


def test_attach_gives_a_policy_that_remembers_its_episode() -> None:
    one, pruner = policy("parallel"), VLAPruner(layer=2)
    seen = [observation(i, time_s=0.1 * i) for i in range(3)]
    memory = Memory()
    expected = [run(one.pruned_by(pruner), o, Budget(8), memory) for o in seen]
    with attach(one, "vla_pruner", budget=8, layer=2) as pruned:
        for _ in range(2):
            for o, actions in zip(seen, expected, strict=True):
                assert np.array_equal(pruned.act(o).actions, actions)
            assert pruned.plan.k == 8
            pruned.reset()
    with attach(one, retain=1.0) as whole:
        assert np.array_equal(whole.act(seen[0]).actions, plainly(one, seen[0]).numpy())
    with pytest.raises(BudgetError, match="exactly one"):
        attach(one, "fastv", budget=8, retain=0.5)
