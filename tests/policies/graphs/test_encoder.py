"""A lean vision layer says what transformers' layer says, in fewer kernels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from policies.graphs import encoder
from policies.graphs.encoder import Sum
from policies.probes import Attention, probing

from ..kernels import kernels
from .test_layer import Counted

FAMILIES = ["siglip", "erf", "dinov2", "swiglu", "no_bias"]
SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}


def vision_model(family: str) -> Any:
    """A tiny vision model none of whose norms, biases and scales is that of a fresh one."""
    torch.manual_seed(0)
    config: Any
    if family in ("siglip", "erf"):
        act = "gelu" if family == "erf" else "gelu_pytorch_tanh"
        picture = {"image_size": 24, "patch_size": 8, "vision_use_head": False}
        config = SiglipVisionConfig(**SIZE, **picture, intermediate_size=48, hidden_act=act)
        model: Any = SiglipVisionModel(config)
    else:
        config = Dinov2WithRegistersConfig(
            **SIZE,
            image_size=24,
            patch_size=8,
            use_swiglu_ffn=family == "swiglu",
            qkv_bias=family != "no_bias",
        )
        model = Dinov2WithRegistersModel(config)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("norm", "bias", "lambda", "token")):
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.5)
    model.set_attn_implementation("sdpa")
    return model.eval()


def layers_of(model: Any) -> Any:
    own = getattr(model, "vision_model", model).encoder
    return getattr(own, "layers", None) or own.layer


def stock(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x, attention_mask=None) if hasattr(layer, "self_attn") else layer(x)
    return x


def lean(layers: Any, x: Tensor) -> Tensor:
    made = [encoder.lean(layer) for layer in layers]
    assert all(made)
    return encoder.run_layers([layer for layer in made if layer is not None], x).total()


@pytest.mark.parametrize("shape", [(1, 1), (3, 7)])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_layers_say_what_the_stock_ones_say(family: str, shape: tuple[int, int]) -> None:
    layers, x = layers_of(vision_model(family)), torch.randn(*shape, 32)
    want = stock(layers, x)
    assert torch.allclose(lean(layers, x), want, atol=1e-5, rtol=1e-5)
    assert torch.equal(stock(layers, x), want), "joined weights are the layers' own"


@torch.inference_mode()
def test_eager_attention_comes_out_alike() -> None:
    model, x = vision_model("siglip"), torch.randn(2, 5, 32)
    model.set_attn_implementation("eager")
    want = stock(layers_of(model), x)
    assert torch.allclose(lean(layers_of(model), x), want, atol=1e-5)


@torch.inference_mode()
def test_probes_see_what_they_see_of_the_stock_layer() -> None:
    model, x = vision_model("siglip"), torch.randn(2, 5, 32)
    layers, seen = layers_of(model), list[Attention]()
    with probing(model, {layers[1].self_attn: seen.append}):
        stock(layers, x)
        lean(layers, x)
    one, other = (attention.received_from_all() for attention in seen)
    assert torch.allclose(one, other, atol=1e-6)


def test_what_is_unknown_or_hooked_is_no_lean_layer() -> None:
    class Other(type(layers_of(vision_model("siglip"))[0])):  # type: ignore[misc]
        pass

    known = layers_of(vision_model("siglip"))[0]
    other = copy.copy(known)
    other.__class__ = Other
    assert encoder.lean(other) is None
    handle = known.mlp.fc2.register_forward_hook(lambda module, given, said: said + 1)
    assert encoder.lean(known) is None
    handle.remove()
    assert encoder.lean(known) is not None


@torch.inference_mode()
def test_layers_take_fewer_operators_where_nothing_is_fused_too() -> None:
    layers, x, counts = layers_of(vision_model("siglip")), torch.randn(1, 9, 32), []
    for run in (stock, lean):
        run(layers, x)
        with Counted() as counted:
            run(layers, x)
        counts.append(len(counted.names))
    assert counts[1] <= counts[0] - 2 * len(layers)


@pytest.mark.gpu
@torch.inference_mode()
def test_a_layer_on_a_gpu_is_at_most_eight_kernels() -> None:
    """Of a width that a GPU's products like."""
    config = SiglipVisionConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=2
    )
    layers = layers_of(SiglipVisionModel(config).eval().to("cuda", torch.bfloat16))
    made = [encoder.lean(layer) for layer in layers]
    x = torch.randn(1, 64, 128, device="cuda", dtype=torch.bfloat16)
    run = [layer for layer in made if layer is not None]
    assert 0 < kernels(lambda: encoder.run_layers(run, x).total()) <= 8 * len(layers)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_gpu_says_what_a_cpu_says(family: str, dtype: torch.dtype) -> None:
    """bfloat16 on the GPU is about as near to float32 as the stock layers are."""
    model, x = vision_model(family).to(dtype), torch.randn(2, 16, 32).to(dtype)
    exact = stock(layers_of(copy.deepcopy(model).float()), x.float())
    layers, x = layers_of(model.to("cuda")), x.to("cuda")
    assert encoder.compiled() is not None
    usual, got = stock(layers, x), lean(layers, x)
    assert got.dtype == dtype
    error, usual_error = (float((t.float().cpu() - exact).norm()) for t in (got, usual))
    assert error <= max(1.5 * usual_error, 1e-3)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_sum_is_its_parts(scaled: bool) -> None:
    x, more, scale, norm = (
        torch.randn(2, 3, 4),
        torch.randn(2, 3, 4),
        torch.randn(4),
        nn.LayerNorm(4),
    )
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    now = Sum(x, more, scale if scaled else None)
    want = x + more * scale if scaled else x + more
    assert torch.equal(now.total(), want)
    total, normed = now.normed(norm)
    assert torch.equal(total, want)
    assert torch.allclose(normed, norm(want), atol=1e-6)
    assert Sum(x).total() is x
    assert torch.equal(Sum(x).normed(norm)[1], F.layer_norm(x, (4,), norm.weight, norm.bias))
