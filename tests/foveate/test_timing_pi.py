"""The shapes of pi0 and pi05 in the speed bench are those of lerobot's own policies."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaModel

from foveate.timing import shapes
from foveate.timing.flow import ExpertShape, FlowSubject
from foveate.timing.flow_lean import LeanExpert
from tests.policies.vla import lerobot_models


def weights(*modules: nn.Module) -> int:
    """Of linear layers and convolutions, biases included."""
    kinds = (nn.Linear, nn.Conv2d)
    each = (m for module in modules for m in module.modules() if isinstance(m, kinds))
    return sum(p.numel() for m in each for p in m.parameters())


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_full_size_holds_as_many_weights(kind: str) -> None:
    configs = importlib.import_module(f"lerobot.policies.{kind}.configuration_{kind}")
    modeling = importlib.import_module(f"lerobot.policies.{kind}.modeling_{kind}")
    name = kind.upper()
    with torch.device("meta"):
        theirs: Any = getattr(modeling, f"{name}Pytorch")(getattr(configs, f"{name}Config")())
    paligemma, expert = (
        theirs.paligemma_with_expert.paligemma.model,
        theirs.paligemma_with_expert.gemma_expert.model,
    )
    one = shapes.flow_subject(kind, 1, "meta", torch.bfloat16)
    own: Any = one.expert
    assert weights(own.layers, own.norm) == weights(expert)
    assert weights(own) - weights(own.layers, own.norm) == sum(
        weights(module)
        for module in theirs.children()
        if module is not theirs.paligemma_with_expert
    )
    assert weights(one.text_model) == weights(paligemma.language_model)
    assert weights(one._tower) == weights(paligemma.vision_tower)
    assert weights(one._projector) == weights(paligemma.multi_modal_projector)
    config = theirs.config
    assert one.grid.per_frame == (config.image_resolution[0] // 14) ** 2
    assert one.prompt.after == config.tokenizer_max_length
    assert one.noise.shape == (1, config.chunk_size, config.max_action_dim)
    assert own.shape.steps == config.num_inference_steps
    assert own.shape.state == (config.max_state_dim if kind == "pi0" else 0)


@torch.inference_mode()
def test_pi0_acts_as_lerobots_own_does() -> None:
    """Its own weights in the bench's expert, behind a random cache of the prefix."""
    policy = lerobot_models.pi0()
    model, theirs = policy.model, policy.model.paligemma_with_expert.gemma_expert.model
    one = subject_of(theirs.config, model)
    generator = torch.Generator().manual_seed(1)
    depth, length = theirs.config.num_hidden_layers, one.positions().shape[1]
    keys, values = (
        list(torch.randn(depth, 2, 1, length, 16, generator=generator)) for _ in range(2)
    )
    noise, state = (torch.randn(2, *shape, generator=generator) for shape in ((6, 8), (8,)))
    cache = DynamicCache()
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        cache.update(key, value, layer)
    seen, expected = torch.ones(2, length, dtype=torch.bool), noise
    for step in range(lerobot_models.STEPS):
        time = torch.full((2,), 1 - step / lerobot_models.STEPS)
        velocity = model.denoise_step(state, seen, cache, expected, time)
        expected = expected - velocity / lerobot_models.STEPS
    assert (expected - noise).abs().max() > 0.1
    for act in (one.actions, LeanExpert(one)):
        said = act(noise, state, keys, values)
        torch.testing.assert_close(said, expected, atol=1e-4, rtol=0)


def subject_of(config: Any, model: Any) -> FlowSubject:
    """A subject whose expert is that of a pi0 of lerobot."""
    theirs = model.paligemma_with_expert.gemma_expert.model
    heads = {name: getattr(config, name) for name in ("num_attention_heads", "head_dim")}
    heads |= {"num_key_value_heads": config.num_key_value_heads}
    prefix = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=config.num_hidden_layers,
        hidden_act=config.hidden_activation,
        vocab_size=128,
        **heads,
    )
    shape = ExpertShape(
        config.hidden_size,
        config.intermediate_size,
        actions=8,
        chunk=lerobot_models.CHUNK,
        steps=lerobot_models.STEPS,
        state=8,
    )
    tower = shapes.flow_subject("tiny-pi0", 1, "cpu", torch.float32)._tower
    one = FlowSubject("pi0", tower, 1, LlamaModel(prefix), 9, shape, 1)
    own: Any = one.expert
    pairs: list[Any] = [
        (own.enter, model.action_in_proj),
        (own.state, model.state_proj),
        (own.time[0], model.action_time_mlp_in),
        (own.time[2], model.action_time_mlp_out),
        (own.leave, model.action_out_proj),
    ]
    norms: list[Any] = [(own.norm, theirs.norm)]
    for mine, layer in zip(own.layers, theirs.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        pairs += [(mine.query, attention.q_proj), (mine.key, attention.k_proj)]
        pairs += [(mine.value, attention.v_proj), (mine.out, attention.o_proj)]
        pairs += [(mine.mlp.gate, mlp.gate_proj), (mine.mlp.up, mlp.up_proj)]
        pairs += [(mine.mlp.down, mlp.down_proj)]
        norms += [(mine.norms[0], layer.input_layernorm)]
        norms += [(mine.norms[1], layer.post_attention_layernorm)]
    for mine, given in pairs:
        mine.load_state_dict(given.state_dict())
    for mine, given in norms:
        mine.weight.copy_(1 + given.weight)
    return one
