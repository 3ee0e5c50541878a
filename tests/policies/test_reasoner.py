"""The pipeline's reasoner lays out and answers exactly as the attached model does."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLVideoProcessor,
)

from policies.attach import attach
from policies.hooks import Positions
from policies.reasoner import VideoReasoner
from stream.data import Budget, Frame
from stream.memory import Memory
from stream.pipeline import EncodedVideo, chunked, reduce_video
from stream.registry import build_reducer

from .tiny_models import VIDEO_ID, llava_onevision, qwen2_5_vl

WORDS = ["what", "moves", "where", "is", "it", "now"]
FRAMES = [
    Frame(np.random.default_rng(t // 3).integers(0, 255, (48, 64, 3), np.uint8), t / 2, t)
    for t in range(8)
]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<unk>": 1, "<user>": 2, "<end>": 3}
    vocabulary |= {word: 10 + i for i, word in enumerate(WORDS)}
    vocabulary["<video>"] = VIDEO_ID
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    )


def chat(messages: Any, add_generation_prompt: bool) -> str:
    return f"<user> <video> {messages[0]['content'][1]['text']} <end>"


def family(name: str) -> tuple[Any, Any]:
    if name == "llava_onevision":
        size = {"height": 40, "width": 40}
        return llava_onevision(), SimpleNamespace(
            tokenizer=tokenizer(),
            apply_chat_template=chat,
            video_processor=LlavaOnevisionVideoProcessor(size=size),
        )
    sizes = {"shortest_edge": 8 * 8 * 8, "longest_edge": 24 * 32 * 8}
    return qwen2_5_vl(), SimpleNamespace(
        tokenizer=tokenizer(),
        apply_chat_template=chat,
        video_processor=Qwen2VLVideoProcessor(patch_size=4, merge_size=2, size=sizes),
    )


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("reducer", ["identity", "holitom", "fastv", "uniform"])
@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_reasoner_equals_attached_model(name: str, reducer: str, positions: Positions) -> None:
    model, processor = family(name)
    method = build_reducer(reducer)
    reasoner = VideoReasoner(model, processor, method, positions=positions, max_new_tokens=4)
    parts = [reasoner.encode(chunk) for chunk in chunked(iter(FRAMES), 4)]
    encoded = EncodedVideo.joined(parts)
    budget = Budget.ratio(0.4, of=encoded.grid.size)
    video = reduce_video(encoded, method, budget, Memory())
    questions = ["what moves", "where is it now"]
    reply = reasoner.answer(video, questions)

    for question, answer, plan in zip(questions, reply.answers, reply.plans, strict=True):
        inputs = whole_inputs(model, processor, reasoner, question)
        with attach(model, method, budget=budget.tokens, positions=positions) as attached:
            output = model.generate(
                **inputs,
                max_new_tokens=4,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=0,
            )
        new = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        assert tuple(new[: len(answer.token_ids)]) == answer.token_ids
        chance = torch.stack(output.logits).float().softmax(-1).amax(-1).mean()
        assert float(chance) == pytest.approx(answer.confidence, abs=1e-6)
        assert attached.plans[0][0].same_as(plan)


def whole_inputs(model: Any, processor: Any, reasoner: VideoReasoner, question: str) -> Any:
    """The unreduced inputs a transformers user would pass."""
    pixels = reasoner.adapter.pixel_inputs(FRAMES, processor)
    llava = "pixel_values" in pixels
    if llava:
        extra = {"pixel_values_videos": pixels["pixel_values"]}
        places = len(FRAMES) * 9 + 1
    else:
        extra = {"pixel_values_videos": pixels["pixels"], "video_grid_thw": pixels["thw"]}
        places = int(pixels["thw"].prod()) // 4
    text = chat([{"content": [None, {"text": question}]}], True)
    ids = processor.tokenizer(text)["input_ids"]
    at = ids.index(VIDEO_ID)
    row = torch.tensor([[*ids[:at], *[VIDEO_ID] * places, *ids[at + 1 :]]])
    inputs = {"input_ids": row, "attention_mask": torch.ones_like(row), **extra}
    if not llava:
        inputs["mm_token_type_ids"] = (row == VIDEO_ID).int() * 2
    return inputs


def test_a_listener_follows_an_answer_and_ends_it() -> None:
    model, processor = family("llava_onevision")
    method = build_reducer("identity")
    reasoner = VideoReasoner(model, processor, method, max_new_tokens=4)
    encoded = reasoner.encode(FRAMES)
    video = reduce_video(encoded, method, Budget(encoded.grid.size), Memory())
    whole = reasoner.answer(video, ["what moves"]).answers[0]
    heard: list[tuple[int, ...]] = []

    def listener(token_ids: Sequence[int]) -> bool:
        heard.append(tuple(token_ids))
        return len(token_ids) == 2

    with reasoner.generating(6, listener):
        short = reasoner.answer(video, ["what moves"]).answers[0]
    assert [len(ids) for ids in heard] == [1, 2]
    assert heard[-1] == short.token_ids == whole.token_ids[:2]
    assert reasoner.answer(video, ["what moves"]).answers[0] == whole
    assert len(heard) == 2


def test_control_tokens_in_a_text_are_found() -> None:
    model, processor = family("llava_onevision")
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]})
    reasoner = VideoReasoner(model, processor, build_reducer("identity"))
    assert reasoner.control_tokens("what moves now or never") == []
    assert reasoner.control_tokens("what <end> moves <video>") == ["<end>", "<video>"]
    assert reasoner.text_tokens("what moves") == 4
