"""Frames encoded by programs have the features and signals that the encoder gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from policies.adapter import VideoAdapter
from policies.graphs import standing
from policies.models import load
from policies.reasoner import VideoReasoner
from policies.vision.captured import CapturedEncoder
from stream.data import Budget
from stream.errors import AttachError
from stream.memory import Memory
from stream.pipeline import EncodedVideo, reduce_video
from stream.registry import build_reducer

from .. import changes
from ..graphs.taped import TapedPool
from ..test_reasoner import FRAMES, family


def pair(parts: tuple[Any, Any], method: str) -> tuple[VideoReasoner, VideoReasoner]:
    """Not captured, and captured where there is a GPU."""
    reducer = build_reducer(method)
    off, on = (VideoReasoner(*parts, reducer, capture=c) for c in ("off", "on"))
    return off, on


def same(one: EncodedVideo, other: EncodedVideo, atol: float) -> None:
    assert torch.allclose(one.x, other.x, atol=atol)
    assert one.signals.keys() == other.signals.keys()
    for signal, value in one.signals.items():
        assert torch.allclose(value, other.signals[signal], atol=atol)
    assert (one.grid, one.pts_s) == (other.grid, other.pts_s)


def encoded_again_and_again(parts: tuple[Any, Any], method: str, atol: float) -> CapturedEncoder:
    off, on = pair(parts, method)
    chunks = [FRAMES[:3], FRAMES[3:6], FRAMES[5:], FRAMES[1:4]]
    made = [on.encode(chunk) for chunk in chunks]
    assert on._encoder is not None
    assert len(on._encoder._programs) == 0, "one request gains nothing by a capture"
    budget = Budget.ratio(0.4, of=made[0].grid.size)
    on.answer(reduce_video(made[0], build_reducer(method), budget, Memory()), ["what moves"])
    chunks += [FRAMES[:1], *chunks, FRAMES[2:3]]
    made += [on.encode(chunk) for chunk in chunks[4:]]
    for chunk, one in zip(chunks, made, strict=True):
        same(one, off.encode(chunk), atol)
    assert len(on._encoder._programs) == 1, "one frame came in one request"
    return on._encoder


@pytest.mark.parametrize("method", ["holitom", "identity"])
@torch.inference_mode()
def test_numbers_of_frames_that_come_again_are_a_program(method: str) -> None:
    encoded_again_and_again(family("llava_onevision"), method, 1e-6)


def test_a_call_that_overlaps_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    off, on = pair(family("llava_onevision"), "identity")
    expected = off.encode(FRAMES[:3])
    on.encode(FRAMES[:3])
    assert on._encoder is not None
    on._encoder.end_request()
    encoded = VideoAdapter.encoded

    def meanwhile(*given: Any) -> Any:
        monkeypatch.undo()
        with pytest.raises(AttachError, match="busy with another call"):
            on.encode(FRAMES[3:6])
        return encoded(*given)

    monkeypatch.setattr(VideoAdapter, "encoded", meanwhile)
    same(on.encode(FRAMES[:3]), expected, 1e-6)
    same(on.encode(FRAMES[:3]), expected, 1e-6)


def test_an_encoder_that_asks_the_device_back_stays_as_it_is() -> None:
    _, on = pair(family("qwen2_5_vl"), "holitom")
    assert on._encoder is None


@pytest.mark.parametrize("method", ["holitom", "identity"])
def test_replayed_operators_do_without_python(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "GraphPool", TapedPool)
    encoder = encoded_again_and_again(family("llava_onevision"), method, 1e-6)
    assert encoder.pool.captured == 1


def converted(network: nn.Module) -> None:
    network.double()


@pytest.mark.parametrize("taped", [True, False])
@pytest.mark.parametrize("change", [changes.assigned, changes.overwritten, converted])
def test_a_changed_tower_encodes_as_it_is_now(
    change: changes.Change, taped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if taped:
        monkeypatch.setattr(standing, "GraphPool", TapedPool)
    parts = family("llava_onevision")
    off, on = pair(parts, "holitom")
    assert on._encoder is not None

    def encoded() -> EncodedVideo:
        on._encoder.end_request()
        made = on.encode(FRAMES[:3])
        same(made, off.encode(FRAMES[:3]), 1e-6)
        return made

    before = [encoded(), encoded()][1]
    pool = on._encoder.pool
    change(parts[0].model.vision_tower if change is not converted else parts[0])
    after = encoded()
    assert not torch.equal(before.x, after.x)
    assert (on._encoder.pool is pool) == (change is changes.overwritten)
    assert on._encoder.pool.captured == taped


def test_hooks_on_a_tower_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "GraphPool", TapedPool)
    parts = family("llava_onevision")
    off, on = pair(parts, "holitom")
    assert on._encoder is not None
    for _ in range(2):
        on._encoder.end_request()
        free = on.encode(FRAMES[:3])
    on._encoder.end_request()
    name = next(n for n, _ in parts[0].model.vision_tower.named_modules() if n.endswith("fc1"))
    with changes.hooked(parts[0].model.vision_tower, name) as ran:
        with pytest.warns(UserWarning, match="The encoder of .* has hooks"):
            bound = on.encode(FRAMES[:3])
        assert len(ran) == 1
        same(bound, off.encode(FRAMES[:3]), 0.0)
    assert not torch.equal(bound.x, free.x)
    same(on.encode(FRAMES[:3]), free, 0.0)
    assert on._encoder.pool.captured == 1


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["holitom", "identity"])
def test_a_gpu_encodes_the_same_captured(method: str) -> None:
    encoder = encoded_again_and_again(load("tiny-video", "cuda", torch.float32), method, 1e-4)
    assert (encoder.pool.captured, encoder.pool.fallen_back) == (1, [])
