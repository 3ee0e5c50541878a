"""Linear layers that read the same input, as one product."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from policies.graphs.joined import one_product

SIZES = (3, 1, 5)


def layers(bias: bool = True) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(4, size, bias=bias) for size in SIZES]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_one_product_says_what_each_layer_says(bias: bool, inside: bool) -> None:
    """Joined within inference mode and without."""
    own, x = layers(bias), torch.randn(2, 4)
    expected = [layer(x) for layer in own]
    with torch.inference_mode(inside):
        said = one_product(own)
    for got, layer, want in zip(said(x), own, expected, strict=True):
        assert torch.allclose(got, want, atol=1e-6)
        assert torch.equal(layer(x), want)


def test_nothing_is_held_twice_and_what_changes_in_place_is_heard() -> None:
    own, x = layers(), torch.randn(2, 4)
    first, again = one_product(own), one_product(own)
    assert len({layer.weight.untyped_storage().data_ptr() for layer in own}) == 1
    assert own[0].weight.untyped_storage().nbytes() == 4 * 4 * sum(SIZES)
    with torch.no_grad():
        own[2].weight.zero_()
        own[2].bias.fill_(7.0)
    for said in (first, again):
        assert torch.equal(said(x)[2], torch.full((2, 5), 7.0))


class Quantised(torch.Tensor):
    """As quantised weights are: a tensor of a type of its own, that only its own code can read."""


@pytest.mark.parametrize("kind", ["subclass", "hooked", "replaced", "some biases", "quantised"])
def test_what_is_not_plain_is_called_as_it_is(kind: str) -> None:
    class Shifted(nn.Linear):
        def forward(self, x: Any) -> Any:
            return super().forward(x) + 1

    own, x = layers(), torch.randn(2, 4)
    if kind == "subclass":
        own[1].__class__ = Shifted
    elif kind == "hooked":
        own[1].register_forward_hook(lambda module, args, said: said + 1)
    elif kind == "replaced":
        own[1].forward = lambda x: x.new_ones(2, 1)  # type: ignore[method-assign]
    elif kind == "some biases":
        own[1].bias = None  # type: ignore[assignment]
    else:
        own[1].weight = nn.Parameter(own[1].weight.detach().as_subclass(Quantised))
    expected = [layer(x) for layer in own]
    for got, want in zip(one_product(own)(x), expected, strict=True):
        assert torch.equal(got, want)
    assert len({layer.weight.untyped_storage().data_ptr() for layer in own}) == 3


def test_a_layer_keeps_its_precision_beside_others() -> None:
    own, x = layers(), torch.randn(2, 4)
    own[1].half()
    one_product(own)
    assert [layer.weight.dtype for layer in own] == [torch.float32, torch.float16, torch.float32]
    assert own[1](x.half()).dtype == torch.float16


def test_a_joined_model_saves_what_it_saved_before(tmp_path: Path) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = model.model.layers[0].self_attn
    one_product([own.q_proj, own.k_proj, own.v_proj])
    model.save_pretrained(tmp_path)
    after = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
