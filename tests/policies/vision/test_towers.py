"""Encoders that compute less: exact where nothing is saved, close where little changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from policies.adapter import SaliencyTap, adapter_for
from policies.models import load
from policies.reasoner import VideoReasoner
from policies.video.llava_onevision import Adapter
from policies.video.tiny.evaluate import rendered_clips
from policies.vision.lean import Encoder
from policies.vision.merging import MergingTower, merge
from policies.vision.siglip import spread
from policies.vision.skipping import SkippingTower, spread_evenly
from stream.data import Frame, PatchGrid
from stream.errors import AttachError, ConfigError
from stream.registry import build_reducer
from stream.signals import Signal

from ..changes import Change, adapted, assigned, moved
from ..tiny_models import llava_onevision, qwen2_5_vl

FRAMES, SIDE = 8, 5


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return Adapter(llava_onevision())


def clip(moving: int, seed: int = 0) -> Tensor:
    """[8, 3, 40, 40]: one picture in which the first `moving` patches differ in every frame."""
    generator = torch.Generator().manual_seed(seed)
    still = torch.randn(1, 3, 40, 40, generator=generator).repeat(FRAMES, 1, 1, 1)
    for patch in range(moving):
        y, x = divmod(patch, SIDE)
        fresh = torch.randn(FRAMES, 3, 8, 8, generator=generator)
        still[:, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = fresh
    return still


@torch.inference_mode()
def exact(adapter: Adapter, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(features, pooled saliency) of the stock model."""
    tap = SaliencyTap()
    with adapter.saliency(tap):
        x, grid = adapter.features({"pixel_values": pixels[None]})
    return x, adapter.pooled_saliency(tap.take(), [grid])[0]


def pooled(adapter: Adapter, hidden: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    grid = PatchGrid(FRAMES, 3, 3)
    return adapter.projected(hidden), adapter.pooled_saliency(score, [grid])[0]


def error(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@torch.inference_mode()
def test_without_merges_the_tower_is_the_stock_one(adapter: Adapter) -> None:
    pixels = clip(6)
    tower = MergingTower(adapter.vision_model, {})
    mine, stock = pooled(adapter, *tower(pixels, saliency=True)), exact(adapter, pixels)
    for one, other in zip(mine, stock, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("moving", [0, 4])
def test_a_frame_that_changed_little_is_encoded_as_if_whole(adapter: Adapter, moving: int) -> None:
    pixels = clip(moving)
    tower = SkippingTower(adapter.vision_model, refresh=8, share=0.25)
    layout = tower.layout(pixels)
    assert layout.keys.tolist() == [0]
    mine = pooled(adapter, *tower(pixels, layout, saliency=True))
    stock = exact(adapter, pixels)
    assert error(mine[0], stock[0]) < (1e-6 if moving == 0 else 0.25)
    assert error(mine[1], stock[1]) < (1e-5 if moving == 0 else 0.25)
    stale = stock[0].view(FRAMES, -1)[:1].expand(FRAMES, -1).reshape_as(stock[0])
    if moving:
        assert error(mine[0], stock[0]) < 0.5 * error(stale, stock[0])


@torch.inference_mode()
def test_what_moves_much_is_encoded_whole(adapter: Adapter) -> None:
    pixels = clip(20)
    tower = SkippingTower(adapter.vision_model, share=0.25)
    layout = tower.layout(pixels)
    assert layout.keys.tolist() == list(range(FRAMES))
    hidden, score = tower(pixels, layout, saliency=True)
    assert error(pooled(adapter, hidden, score)[0], exact(adapter, pixels)[0]) < 1e-6


@torch.inference_mode()
def test_what_stands_still_learns_of_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load("tiny-video", "cpu")
    trained = Adapter(model)
    frames = next(rendered_clips(1, 8, torch.device("cpu"))).frames[0]
    pixels = (frames - 0.5) / 0.5
    tower = SkippingTower(trained.vision_model)
    layout = tower.layout(pixels)
    assert layout.later.numel() >= 2
    stock = trained.features({"pixel_values": pixels[None]})[0]

    def loss() -> float:
        return error(trained.projected(tower(pixels, layout)[0]), stock)

    told = loss()
    told_by = tower._told_by
    monkeypatch.setattr(tower, "_told_by", lambda *given: 0 * told_by(*given))
    assert told < 0.5 * loss()


@pytest.mark.parametrize("change", [assigned, adapted, moved, nn.Module.double])
@pytest.mark.parametrize("kind", [MergingTower.usual, SkippingTower])
@torch.inference_mode()
def test_a_tower_is_what_it_is_now(kind: Callable[[Any], Any], change: Change) -> None:
    tower, twin = (Adapter(llava_onevision()).vision_model for _ in range(2))

    def seen(lean: Any) -> Tensor:
        given = (lean.layout(clip(4)),) if kind is SkippingTower else ()
        hidden: Tensor = lean(clip(4).to(next(tower.parameters()).dtype), *given, False)[0]
        return hidden

    lean = kind(tower)
    before = seen(lean)
    for each in (tower, twin):
        change(each)
    got, want = seen(lean), seen(kind(twin))
    assert change is moved or not torch.equal(got.float(), before)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", [5, 8, 27])
def test_the_first_turns_are_spread_evenly(side: int) -> None:
    turn = spread_evenly(side)
    assert turn.unique().numel() == side**2
    half = side // 2
    quarter = turn.view(side, side)[: 2 * half, : 2 * half] < 0.25
    assert bool((quarter.unflatten(0, (half, 2)).unflatten(2, (half, 2)).sum((1, 3)) == 1).all())


@pytest.mark.parametrize("refresh", [1, 3, 8])
def test_no_key_frame_lives_longer_than_the_refresh(adapter: Adapter, refresh: int) -> None:
    layout = SkippingTower(adapter.vision_model, refresh=refresh).layout(clip(0))
    assert layout.keys.tolist() == list(range(0, FRAMES, refresh))
    assert sorted([*layout.keys.tolist(), *layout.later.tolist()]) == list(range(FRAMES))
    age = layout.later - layout.keys[layout.behind]
    assert bool(((age > 0) & (age < refresh)).all())


@pytest.mark.parametrize(("n", "gone"), [(9, 0), (9, 1), (9, 4), (16, 8)])
def test_merging_keeps_the_sum_of_what_was_merged(n: int, gone: int) -> None:
    x, metric = torch.randn(3, n, 6), torch.randn(3, n, 4)
    size = torch.randint(1, 4, (3, n)).float()
    left, sizes, slot = merge(x, metric, size, gone)
    assert left.shape == (3, n - gone, 6)
    assert torch.equal(sizes.sum(1), size.sum(1))
    whole = (x * size[..., None]).sum(1)
    assert torch.allclose((left * sizes[..., None]).sum(1), whole, atol=1e-5)
    for i in range(3):
        for place in range(n - gone):
            members = slot[i] == place
            mean = (x[i] * size[i, :, None])[members].sum(0) / size[i][members].sum()
            assert torch.allclose(left[i, place], mean, atol=1e-5)


def test_the_most_alike_are_merged() -> None:
    metric = torch.eye(6)[None].clone()
    metric[0, 4] = metric[0, 1]
    _, sizes, slot = merge(torch.randn(1, 6, 3), metric, torch.ones(1, 6), 1)
    assert slot[0, 4] == slot[0, 1]
    assert sorted(sizes[0].tolist()) == [1.0, 1.0, 1.0, 1.0, 2.0]


@torch.inference_mode()
def test_merged_patches_get_rows_back_and_cost_an_error(adapter: Adapter) -> None:
    pixels = clip(6)
    stock = exact(adapter, pixels)[0]
    errors = []
    for share in (0.1, 0.3, 0.5):
        (hidden,) = MergingTower(adapter.vision_model, {0: share})(pixels)
        assert hidden.shape[:2] == (FRAMES, SIDE**2)
        errors.append(error(adapter.projected(hidden), stock))
    assert 0 < errors[0] < errors[1] < errors[2] < 1


def test_merges_that_do_not_fit_are_refused(adapter: Adapter) -> None:
    tower: Any = adapter.vision_model
    for merges in ({2: 0.1}, {0: 0.6}):
        with pytest.raises(ConfigError, match=r"at most 0\.5"):
            MergingTower(tower, merges)


def test_spread_names_rows() -> None:
    x = torch.randn(2, 3, 4)
    source = torch.tensor([[2, 0, 0], [1, 1, 2]])
    assert torch.equal(spread(x, source)[1, 0], x[1, 1])
    assert torch.equal(spread(x[..., 0], source)[0], x[0, [2, 0, 0], 0])


@pytest.mark.parametrize("encoder", ["merge", "skip"])
def test_a_reasoner_takes_a_lean_encoder_by_name(encoder: Encoder) -> None:
    model, processor = load("tiny-video", "cpu")
    image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    frames = [Frame(image, float(t), t) for t in range(2)]
    reducer = build_reducer("holitom")
    exact_video = VideoReasoner(model, processor, reducer).encode(frames)
    video = VideoReasoner(model, processor, reducer, encoder=encoder).encode(frames)
    assert video.grid == exact_video.grid
    assert video.signals[Signal.SALIENCY].shape == (video.grid.size,)
    same = error(video.x, exact_video.x)
    assert same < 1e-5 if encoder == "skip" else 0 < same < 1  # nothing moved: nothing is lost


def test_families_without_siglip_name_what_they_lack() -> None:
    with pytest.raises(AttachError, match="runs exact only"):
        adapter_for(qwen2_5_vl()).lean("skip")
