"""A tower in fewer kernels has the hidden states that transformers' has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.siglip.modeling_siglip import SiglipAttention

from policies.video.llava_onevision import Adapter
from policies.vision.layout import lay_out_patches
from policies.vision.tower import LeanTower, patch_rows, states

from ..graphs.test_encoder import vision_model
from ..tiny_models import llava_onevision, qwen2_5_vl


@pytest.mark.parametrize("px", [24, 30])
@pytest.mark.parametrize("family", ["siglip", "dinov2"])
@torch.inference_mode()
def test_states_are_those_of_transformers(family: str, px: int) -> None:
    """Also of pictures that leave a rest behind the last patch."""
    model, pixels = vision_model(family), torch.randn(3, 3, px, px)
    want = model(pixels).last_hidden_state
    assert LeanTower.of(model) is not None
    assert torch.allclose(states(model)(pixels), want, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_places_are_interpolated_where_transformers_does() -> None:
    model, pixels = vision_model("dinov2"), torch.randn(2, 3, 32, 48)
    want = model(pixels).last_hidden_state
    assert want.shape[1] == 4 * 6 + 5
    assert torch.allclose(states(model)(pixels), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("depth", [0, 1, 3])
@torch.inference_mode()
def test_hidden_states_of_any_depth(depth: int) -> None:
    model, pixels = vision_model("siglip"), torch.randn(2, 3, 24, 24)
    want = model(pixels, output_hidden_states=True).hidden_states[depth]
    tower = LeanTower.of(model)
    assert tower is not None
    assert torch.allclose(tower.hidden(pixels, depth), want, atol=1e-5)


@pytest.mark.parametrize("where", ["tower", "encoder", "layer", "patches"])
@torch.inference_mode()
def test_hooks_run_since_what_is_hooked_stays_stock(where: str) -> None:
    model, pixels = vision_model("siglip"), torch.randn(1, 3, 24, 24)
    lay_out_patches(model)
    inner = getattr(model, "vision_model", model)
    assert LeanTower.of(model) is not None, "the order in memory is no value"
    modules: dict[str, Any] = {
        "tower": model,
        "encoder": inner.encoder,
        "layer": inner.encoder.layers[1].mlp,
        "patches": inner.embeddings.patch_embedding,
    }
    called = []
    modules[where].register_forward_hook(lambda *given: called.append(1))
    assert (LeanTower.of(model) is None) == (where != "patches")
    want = model(pixels).last_hidden_state
    assert torch.allclose(states(model)(pixels), want, atol=1e-5)
    assert len(called) == 2


def inner(model: Any) -> Any:
    return getattr(model, "vision_model", model)


def another_attention(model: Any) -> None:
    class Other(SiglipAttention):
        pass

    inner(model).encoder.layers[0].self_attn.__class__ = Other


def another_norm(model: Any) -> None:
    inner(model).encoder.layers[1].layer_norm2 = nn.RMSNorm(32)


def no_bias(model: Any) -> None:
    inner(model).post_layernorm.bias = None


def hooked_norm(model: Any) -> None:
    inner(model).post_layernorm.register_forward_hook(lambda *given: None)


@pytest.mark.parametrize("change", [another_attention, another_norm, no_bias, hooked_norm])
def test_towers_with_unusual_parts_are_left_alone(change: Callable[[Any], None]) -> None:
    model = vision_model("siglip")
    assert LeanTower.of(model) is not None
    change(model)
    assert LeanTower.of(model) is None


def test_other_towers_are_left_alone() -> None:
    assert LeanTower.of(qwen2_5_vl().model.visual) is None
    assert LeanTower.of(nn.Linear(3, 3)) is None


def test_a_convolution_is_a_product() -> None:
    convolution = nn.Conv2d(5, 7, (2, 3), stride=(2, 3))
    pixels = torch.randn(2, 5, 9, 10)
    want = convolution(pixels).flatten(2).transpose(1, 2)
    rows = patch_rows(convolution, pixels)
    assert rows.is_contiguous()
    assert torch.allclose(rows, want, atol=1e-6)


@pytest.mark.parametrize("layer", [-1, -2, 1])
@torch.inference_mode()
def test_features_and_saliency_of_a_video_are_the_usual_ones(layer: int) -> None:
    model = llava_onevision()
    model.config.vision_feature_layer = layer
    adapter, pixels = Adapter(model), {"pixel_values": torch.randn(1, 3, 3, 40, 40)}
    want, grid, signals = adapter.encoded(pixels, saliency=True)
    features = adapter.in_fewer_kernels()
    assert features != adapter.features
    got, own_grid, own_signals = adapter.encoded(pixels, True, features)
    assert own_grid == grid
    assert torch.allclose(got, want, atol=1e-5)
    for one, other in zip(own_signals.values(), signals.values(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("setting", [{"vision_feature_layer": [-1, -2]}, {"strategy": "default"}])
def test_several_layers_or_a_class_token_stay_with_transformers(setting: dict[str, Any]) -> None:
    model = llava_onevision()
    if "strategy" in setting:
        model.config.vision_feature_select_strategy = setting["strategy"]
    else:
        model.config.vision_feature_layer = setting["vision_feature_layer"]
    adapter = Adapter(model)
    assert adapter.in_fewer_kernels() == adapter.features


@torch.inference_mode()
def test_a_projector_says_the_same_of_pooled_rows_and_its_hooks_run() -> None:
    adapter, hidden = Adapter(llava_onevision()), torch.randn(3, 25, 32)
    own = adapter.model.model.multi_modal_projector
    torch.nn.init.normal_(own.linear_2.bias)
    want = adapter.model.model.apply_pooling(own(hidden)).flatten(0, 1)
    assert torch.allclose(adapter.projected(hidden), want, atol=1e-6)
    own.linear_2.register_forward_hook(lambda module, given, said: said + 1)
    assert torch.allclose(adapter.projected(hidden), want + 1, atol=1e-6)
