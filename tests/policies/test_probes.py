"""Recomputed attention rows and columns against the maps of eager attention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from policies.adapter import SaliencyTap, adapter_for
from policies.attach import attach
from policies.probes import Attention, probing
from stream.data import PatchGrid
from stream.errors import AttachError
from stream.signals import Signal
from tests.policies.oracle import build, generate, inputs_of, watching
from tests.policies.tiny_models import VIDEO_ID


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention_maps(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    """The whole [b, h, n, m], query head by query head."""
    groups = query.shape[1] // key.shape[1]
    maps = []
    for head in range(query.shape[1]):
        logits = query[:, head] @ key[:, head // groups].transpose(-1, -2) * scaling
        own = None if mask is None else mask[:, head % mask.shape[1]]
        maps.append((logits if own is None else logits + own).softmax(-1))
    return torch.stack(maps, 1)


@pytest.mark.parametrize("masking", ["none", "causal", "float", "bool", "heads"])
def test_received_is_the_mean_of_rows_of_the_whole_map(masking: str) -> None:
    """Each sequence has rows of its own; some of them do not count."""
    query, key = drawn(2, 4, 9, 8), drawn(2, 2, 9, 8, seed=1)
    allowed = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    allowed[1, :, :, :3] = False  # left padding: the rows of padding see nothing at all
    added = torch.zeros(2, 1, 9, 9).masked_fill(~allowed, torch.finfo(torch.float32).min)
    causal = torch.zeros(2, 1, 9, 9).masked_fill(~torch.ones(9, 9).tril().bool(), -1e9)
    heads = drawn(2, 4, 9, 9, seed=2)
    mask, truth = {
        "none": (None, None),
        "causal": (None, causal),
        "float": (added, added),
        "bool": (allowed, added),
        "heads": (heads, heads),
    }[masking]
    maps = attention_maps(query, key, 0.3, truth).mean(1)
    rows = torch.tensor([[8, 1, 5], [4, 6, 0]])
    taken = torch.tensor([[True, True, True], [True, True, False]])
    got = Attention(query, key, 0.3, mask, masking == "causal").received(rows, taken)
    expected = torch.stack([maps[0, [8, 1, 5]].mean(0), maps[1, [4, 6]].mean(0)])
    assert got.dtype == torch.float32
    assert torch.allclose(got, expected, atol=1e-6)
    assert torch.allclose(got.sum(-1), torch.ones(2), atol=1e-6)


def test_queries_of_a_decode_step_belong_to_the_last_keys() -> None:
    query, key = drawn(1, 4, 9, 8), drawn(1, 2, 9, 8, seed=1)
    whole = Attention(query, key, 0.3, None, True)
    step = Attention(query[:, :, 7:], key, 0.3, None, True)
    rows, one = torch.tensor([[7]]), torch.tensor([[True]])
    assert torch.equal(step.received(rows - 7, one), whole.received(rows, one))
    assert float(step.received(rows - 7, one)[0, 8]) == 0.0


@pytest.mark.parametrize("n", [5, 256, 600])
def test_all_queries_are_the_whole_map_in_blocks(n: int) -> None:
    """256 rows are a block; 600 are two and a part."""
    query, key = drawn(2, 4, n, 8), drawn(2, 4, n, 8, seed=1)
    maps = attention_maps(query, key, 0.3, None)
    got = Attention(query, key, 0.3, None, False).received_from_all()
    assert got.dtype == torch.float32
    assert torch.allclose(got, maps.mean((1, 2)), atol=1e-6)
    half = Attention(query.bfloat16(), key.bfloat16(), 0.3, None, False).received_from_all()
    assert torch.allclose(half, got, atol=2e-2)


def siglip_saliency(model: Any, pixels: Tensor, layer: int) -> Tensor:
    """Eager maps of the vision tower: mean over heads and queries, pooled 5 x 5 -> 3 x 3."""
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        maps = tower(pixels.flatten(0, 1), output_attentions=True).attentions[layer]
    received = maps.mean((1, 2)).view(-1, 1, 5, 5)
    return F.interpolate(received, size=(3, 3), mode="bilinear").flatten()


@pytest.mark.parametrize(("setting", "layer"), [(-1, 1), (-2, 0), (1, 0), (2, 1)])
def test_siglip_saliency_equals_eager_column_means(setting: int, layer: int) -> None:
    """vision_feature_layer counts hidden states, of which the first is the embedding."""
    model = build("llava_onevision")
    model.config.vision_feature_layer = setting
    inputs = inputs_of("llava_onevision")
    with watching() as seen, attach(model, "saliency", retain=0.3):
        generate(model, inputs, max_new_tokens=1, min_new_tokens=1)
    (one,) = seen
    expected = siglip_saliency(model, inputs["pixel_values_videos"], layer)
    assert torch.allclose(one.signals[Signal.SALIENCY], expected, atol=1e-6)
    assert float(expected.std()) > 1e-5


def test_several_vision_layers_have_no_saliency() -> None:
    model = build("llava_onevision")
    model.config.vision_feature_layer = [-1, -2]
    with (
        pytest.raises(AttachError, match="saliency is defined for a single layer"),
        attach(model, "saliency", retain=0.3),
    ):
        pass


def qwen_saliency(pixels: Tensor, thw: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Eager maps of the last vision block, in window order, put back in raster order by hand."""
    tower = build("qwen2_5_vl").model.visual
    tower.set_attn_implementation("eager")
    last = tower.blocks[-1].attn
    real = modeling_qwen2_5_vl.eager_attention_forward
    received = []

    def noted(module: Any, *args: Any, **kwargs: Any) -> Any:
        output, maps = real(module, *args, **kwargs)
        if module is last:
            received.append(maps[0].mean((0, 1)))
        return output, maps

    monkeypatch.setattr(modeling_qwen2_5_vl, "eager_attention_forward", noted)
    with torch.no_grad():
        tower(pixels, thw)
    groups = torch.cat(received).view(-1, 4).mean(1)  # 2 x 2 patches are one token
    order, _ = tower.get_window_index(thw)
    raster = torch.empty_like(groups)
    raster[order] = groups
    assert not torch.equal(raster, groups)  # the windows do reorder
    return raster


@pytest.mark.parametrize("frames", [1, 4])
def test_qwen_saliency_equals_eager_column_means(
    frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_of("qwen2_5_vl", frames=frames)
    model = build("qwen2_5_vl")
    with watching() as seen, attach(model, "saliency", retain=0.3):
        generate(model, inputs, max_new_tokens=1, min_new_tokens=1)
    (one,) = seen
    assert one.signals[Signal.SALIENCY] is not None
    pixels, thw = inputs["pixel_values_videos"], inputs["video_grid_thw"]
    expected = qwen_saliency(pixels, thw, monkeypatch)
    assert torch.allclose(one.signals[Signal.SALIENCY], expected, atol=1e-6)


def test_qwen_saliency_of_videos_of_different_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two grids in one vision pass; each video gets its own part.

    Three windows in a row make an order that is not its own inverse.
    """
    thw = torch.tensor([[2, 4, 12], [3, 4, 4]])
    pixels = drawn(int(thw.prod(1).sum()), 3 * 2 * 4 * 4)
    model = build("qwen2_5_vl")
    adapter, tap = adapter_for(model), SaliencyTap()
    with adapter.saliency(tap), torch.no_grad():
        model.model.visual(pixels, thw)
    order, _ = model.model.visual.get_window_index(thw)
    assert not torch.equal(order, order.argsort())
    grids = [PatchGrid(2, 2, 6), PatchGrid(3, 2, 2)]
    parts = adapter.pooled_saliency(tap.take(), grids)
    assert [part.numel() for part in parts] == [24, 12]
    expected = qwen_saliency(pixels, thw, monkeypatch)
    assert torch.allclose(torch.cat(parts), expected, atol=1e-6)


def test_saliency_of_a_frame_is_its_own() -> None:
    """One odd patch in a flat video changes the maps of its own frame alone."""
    inputs = inputs_of("llava_onevision")
    flat = torch.zeros_like(inputs["pixel_values_videos"])
    odd = flat.clone()
    odd[0, 2, :, 32:40, 0:8] = 3.0
    model = build("llava_onevision")
    maps = []
    for pixels in (flat, odd):
        with watching() as seen, attach(model, "saliency", retain=0.3):
            generate(model, inputs | {"pixel_values_videos": pixels})
        maps.append(seen[0].signals[Signal.SALIENCY].view(4, 9))
    change = (maps[1] - maps[0]).abs().amax(1)
    assert float(change[[0, 1, 3]].max()) < 1e-7
    assert float(change[2]) > 1e-4


def test_an_image_beside_the_video_does_not_shift_saliency() -> None:
    """The vision tower sees the image first; the video's maps are the last ones."""
    model = build("llava_onevision")
    adapter, tap = adapter_for(model), SaliencyTap()
    video = inputs_of("llava_onevision")["pixel_values_videos"]
    with adapter.saliency(tap), torch.no_grad():
        model.model.vision_tower(drawn(1, 3, 40, 40))
        model.model.vision_tower(video.flatten(0, 1))
    (part,) = adapter.pooled_saliency(tap.take(), [PatchGrid(4, 3, 3)])
    assert torch.allclose(part, siglip_saliency(model, video, 1), atol=1e-6)


def test_a_tap_gives_what_ran_since_it_was_last_read() -> None:
    tap = SaliencyTap()
    with pytest.raises(AttachError, match="has not run since"):
        tap.take()
    tap.add(torch.ones(2, 3))
    tap.add(torch.zeros(1, 3))
    assert tap.take().tolist() == [[1.0] * 3, [1.0] * 3, [0.0] * 3]
    tap.add(torch.ones(1, 2))
    tap.add(torch.ones(1, 3))
    assert tap.take().shape == (5,)
    tap.add(torch.ones(1, 2))
    tap.clear()
    with pytest.raises(AttachError, match="has not run since"):
        tap.take()


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_probing_leaves_outputs_bit_equal_and_restores(family: str) -> None:
    model, inputs = build(family), inputs_of(family)
    text = model.model.language_model
    calls: list[Any] = []
    attention = text.layers[2].self_attn
    with torch.no_grad():
        before = model(**inputs).logits
        with probing(text, {attention: lambda a: calls.append((a.query.shape, a.key.shape))}):
            with probing(text, {attention: lambda a: calls.append("second")}):
                inside = model(**inputs).logits
            again = model(**inputs).logits
        after = model(**inputs).logits
    n = inputs["input_ids"].shape[1]
    shapes = (1, 4, n, 16), (1, 2, n, 16)
    assert calls == [shapes, "second", shapes]
    assert torch.equal(before, inside)
    assert torch.equal(before, again)
    assert torch.equal(before, after)
    assert text.config._attn_implementation == "sdpa"


def test_a_padded_batch_keeps_its_mask_while_probed() -> None:
    """An attention function without a mask function of its name would ignore padding."""
    model = build("llava_onevision")
    inputs = inputs_of("llava_onevision")
    ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), inputs["input_ids"]], 1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), inputs["attention_mask"]], 1)
    behind = inputs | {"input_ids": ids, "attention_mask": mask}
    assert int((ids == VIDEO_ID).sum()) == 37
    rows = []
    for prompt in (inputs, behind):
        with watching() as seen, attach(model, "fastv", retain=0.3):
            generate(model, prompt, max_new_tokens=1, min_new_tokens=1)
        rows.append(seen[0].signals[Signal.LAST_ROW])
    assert torch.allclose(*rows, atol=1e-6)


def test_unknown_families_are_refused_with_the_supported_ones() -> None:
    model = build("llava_onevision").model.language_model
    with pytest.raises(AttachError, match=r"'qwen2' \(Qwen2Model\).*llava_onevision, qwen2_5_vl"):
        adapter_for(model)
