"""A model that changed after an answer answers as it is now, and one with hooks runs them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from policies.graphs import greedy
from policies.graphs.footing import Footing
from policies.graphs.layer import LeanLayer, lean

from ..test_reasoner import family
from .taped import TapedPool
from .test_decoder import parts
from .test_greedy import QUESTIONS, Pair


class Adapted(nn.Module):
    """As LoRA puts one around a projection."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.more = nn.Linear(base.in_features, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.more(x)
        return out


def other_weights(model: Any) -> None:
    text = model.model.language_model
    other = {name: tensor * 1.5 for name, tensor in text.state_dict().items()}
    text.load_state_dict(other, assign=True)


def adapters(model: Any) -> None:
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
        layer.self_attn.v_proj = Adapted(layer.self_attn.v_proj)


def precision(model: Any) -> None:
    model.double()


def another_head(model: Any) -> None:
    model.set_output_embeddings(copy.deepcopy(model.get_output_embeddings()))
    nn.init.normal_(model.get_output_embeddings().weight)


@pytest.mark.parametrize("taped", [False, True])
@pytest.mark.parametrize("change", [other_weights, adapters, precision, another_head])
def test_a_changed_model_answers_as_it_is_now(
    change: Callable[[Any], None], taped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if taped:
        monkeypatch.setattr(greedy, "GraphPool", TapedPool)
    pair = Pair(family("llava_onevision"))
    for _ in range(2):
        pair.same(QUESTIONS)
        before = pair.same(QUESTIONS[:1])
    assert sum(behind.pool.captured for behind in pair.shapes) == taped * pair.programs
    shapes = len(pair.shapes)
    change(pair.model)
    after = pair.same(QUESTIONS[:1])
    assert before.answers[0].confidence != after.answers[0].confidence or change is precision
    pair.same(QUESTIONS)
    kept = pair.shapes
    pair.same(QUESTIONS[:1])
    assert set(pair.shapes) == set(kept), "what stands on the model as it is now stays"
    assert len(kept) == shapes


@pytest.mark.parametrize("hooked", ["layers.2", "layers.5.mlp.up_proj", "norm"])
def test_hooks_of_others_run_in_every_step(hooked: str) -> None:
    pair = Pair(family("llava_onevision"))
    free = pair.same(QUESTIONS[:1])
    module = pair.model.model.language_model.get_submodule(hooked)
    seen: list[int] = []

    def hook(module: Any, given: Any, said: Any) -> Any:
        seen.append(1)
        return said * 1.5

    handle = module.register_forward_hook(hook)
    bound = pair.stock.answer(pair.video, QUESTIONS[:1])
    calls = len(seen)
    assert pair.same(QUESTIONS[:1]).answers == bound.answers
    assert len(seen) == 3 * calls
    handle.remove()
    assert pair.same(QUESTIONS[:1]).answers == free.answers
    assert len(seen) == 3 * calls


def test_a_model_on_several_devices_stays_with_the_stock_loop() -> None:
    model = family("llava_onevision")[0]
    text = model.model.language_model
    steps = greedy.GreedySteps.of(model, text)
    assert steps is not None
    assert steps.ready()
    text.layers[3].to("meta")
    assert not steps.ready()


def test_a_layer_with_a_hook_is_no_lean_one() -> None:
    layer = family("llava_onevision")[0].model.language_model.layers[0]
    assert isinstance(lean(layer), LeanLayer)
    handle = layer.self_attn.o_proj.register_forward_pre_hook(lambda module, given: given)
    assert lean(layer) is layer
    handle.remove()
    layer.mlp.forward = layer.mlp.forward
    assert lean(layer) is layer


def test_what_changes_in_place_moves_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)))
    footing = Footing(lambda: (model,))
    with torch.no_grad():
        model[0].weight.zero_()
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert footing.holds()
    model[1].append(nn.Linear(3, 3))
    assert not footing.holds()
    footing.note()
    assert footing.holds()
    model[1][1].half()
    assert not footing.holds()


@torch.inference_mode()
def test_hooks_of_transformers_that_do_nothing_do_not_count() -> None:
    """They stay once hidden states were asked for."""
    text_model, head = parts("llama")
    footing = Footing(lambda: (text_model, head))
    text_model(inputs_embeds=torch.randn(1, 3, 64), output_hidden_states=True)
    assert any(module._forward_hooks for module in text_model.modules())
    assert footing.holds()
    assert footing.is_plain
    assert isinstance(lean(text_model.layers[0]), LeanLayer)
    text_model.layers[0].register_forward_hook(lambda module, args, said: said)
    assert not footing.is_plain
