"""Whole answers as users get them: frames in, tokens out, with captured programs and without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoProcessor, LlavaOnevisionVideoProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from policies.graphs.wanted import Capture
from policies.models import in_the_box, load
from policies.reasoner import VideoReasoner
from stream.data import Budget, Frame
from stream.memory import Memory
from stream.pipeline import CHUNK_FRAMES, EncodedVideo, chunked, reduce_video, timed
from stream.reducers.base import Reducer

from .subjects import SCENE_FRAMES

QUESTIONS = (
    "what moves in the picture and where is it now?",
    "which color is the thing that stands still, and what is left of it?",
    "how many are there?",
)
SIDE_PX = 392
NOISE = 8
STAGES = ("encode", "reduce", "prefill", "decode_tokens")


@dataclass(slots=True)
class Way:
    """One way to answer. early: stages of its first two requests, later: of those that count, in
    ms. What is captured is captured in the second one.

    encode, reduce; prefill: until the first token is known; decode_tokens: until the last one is.
    """

    capture: Capture
    early: list[dict[str, float]] = field(default_factory=list)
    later: list[dict[str, float]] = field(default_factory=list)


def answer_again_and_again(
    name: str,
    reducer: Reducer,
    retain: float,
    frames: int,
    questions: int,
    tokens: int,
    repeats: int,
    seed: int,
    device: str,
    dtype: torch.dtype,
) -> list[Way]:
    """The two ways in turn: two requests each that are kept apart, then `repeats` that count.

    All requests show the same pictures and ask for `tokens` tokens, which no end cuts short.
    """
    model, processor = model_and_processor(name, device, dtype)
    model.generation_config.eos_token_id = None
    pictures = still_scenes(frames, seed)
    ways = [Way("off"), Way("on")]
    reasoners = [VideoReasoner(model, processor, reducer, capture=w.capture) for w in ways]
    for turn in range(2 + repeats):
        for way, reasoner in zip(ways, reasoners, strict=True):
            spent = _request(reasoner, reducer, retain, pictures, QUESTIONS[:questions], tokens)
            (way.early if turn < 2 else way.later).append(spent)
    return ways


def model_and_processor(name: str, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A model by name, or a shape with random weights that reads the words of the one in the box.

    Raises AttachError for what cannot be loaded.
    """
    from .shapes import random_video

    model = random_video(name, device, dtype)
    if model is None:
        return load(name, device, dtype)
    words: Any = AutoProcessor.from_pretrained(in_the_box()["tiny-video"])  # type: ignore[no-untyped-call]
    model.config.video_token_id = words.tokenizer.convert_tokens_to_ids("<video>")
    vision = model.config.vision_config
    if model.config.model_type == "qwen2_5_vl":
        pictures: Any = Qwen2VLVideoProcessor(patch_size=vision.patch_size)
    else:
        side = int(vision.image_size)
        pictures = LlavaOnevisionVideoProcessor(size={"height": side, "width": side})
    return model, SimpleNamespace(
        tokenizer=words.tokenizer,
        apply_chat_template=words.apply_chat_template,
        video_processor=pictures,
    )


def still_scenes(frames: int, seed: int) -> list[Frame]:
    """Two frames a second; scenes of SCENE_FRAMES that stand still up to a little noise."""
    random = np.random.default_rng(seed)
    made = []
    for t in range(frames):
        if t % SCENE_FRAMES == 0:
            scene = random.integers(NOISE, 255 - NOISE, (SIDE_PX, SIDE_PX, 3))
        noise = random.integers(-NOISE, NOISE + 1, scene.shape)
        made.append(Frame((scene + noise).astype(np.uint8), t / 2, t))
    return made


def _request(
    reasoner: VideoReasoner,
    reducer: Reducer,
    retain: float,
    pictures: Sequence[Frame],
    questions: Sequence[str],
    tokens: int,
) -> dict[str, float]:
    spent: dict[str, float] = {}
    device = reasoner.adapter.model.device
    with timed(spent, "encode"):
        parts = [reasoner.encode(chunk) for chunk in chunked(iter(pictures), CHUNK_FRAMES)]
        _drain(device)
    with timed(spent, "reduce"):
        encoded = EncodedVideo.joined(parts)
        budget = Budget.ratio(retain, of=encoded.grid.size)
        video = reduce_video(encoded, reducer, budget, Memory())
        _drain(device)
    with reasoner.generating(tokens, lambda token_ids: False):
        reply = reasoner.answer(video, questions)
    return spent | reply.timings_ms


def _drain(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
