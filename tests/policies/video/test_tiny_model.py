"""The shipped checkpoint, its files, and the packed forward against the stock one."""

import random
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration

from policies.video.tiny.batches import QUESTION_TOKENS, make_batch, pack_questions
from policies.video.tiny.dataset import build, by_video, load, load_samples, read_frames
from policies.video.tiny.evaluate import Clips, answers_right
from policies.video.tiny.modeling import (
    DEFAULT_CHECKPOINT,
    VIDEO,
    Model,
    load_checkpoint,
    make_tokenizer,
    vocabulary,
)
from policies.video.tiny.packed import (
    HEAD_TOKENS,
    frame_tokens,
    pool,
    question_states,
    received_attention,
    visual_positions,
)
from policies.video.tiny.questions import CHOICES, TEMPLATES, Question
from policies.video.tiny.render import render
from policies.video.tiny.world import COLORS, SHAPES


@cache
def trained() -> Model:
    return load_checkpoint()


@torch.inference_mode()
def test_packed_questions_get_the_stock_logits() -> None:
    model, ids = trained(), vocabulary()
    batch = make_batch("heldout", [3, 4], 2, 14, 6, random.Random(0), augment=False)
    frames = render(batch.scenes, batch.times_s)
    positions, start = visual_positions(batch.frame_scale, 14)
    visual = frame_tokens(model, frames).read
    states = question_states(model, visual, positions, start, batch.question_ids)
    packed = model.lm_head(states)
    head = [ids[token] for token in HEAD_TOKENS] + [ids[VIDEO]] * (2 * 196 + 1)
    for video, question in ((0, 0), (1, 5)):
        length = int(batch.answer_at[video, question]) + 1
        tail = batch.question_ids[video, question, :length].tolist()
        stock = model(
            input_ids=torch.tensor([head + tail]),
            pixel_values_videos=(frames[video : video + 1] - 0.5) / 0.5,
        ).logits[0, -length:]
        torch.testing.assert_close(packed[video, question, :length], stock, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_pooling_at_14_is_the_stock_pooling() -> None:
    tokens = torch.randn(2, 784, 8)
    torch.testing.assert_close(pool(tokens, 14), trained().model.apply_pooling(tokens))


@torch.inference_mode()
def test_received_attention_equals_eager_attention() -> None:
    eager = LlavaOnevisionForConditionalGeneration.from_pretrained(
        DEFAULT_CHECKPOINT, dtype=torch.float32, attn_implementation="eager"
    )
    pixels = torch.rand(1, 3, 224, 224) * 2 - 1
    weights = eager.model.vision_tower(pixels, output_attentions=True).attentions[-1]
    expected = pool(weights.mean((1, 2))[..., None], 14)[..., 0]
    torch.testing.assert_close(received_attention(trained(), pixels), expected)


@torch.inference_mode()
def test_the_checkpoint_answers_the_questions_about_a_sample() -> None:
    video, items = next(iter(by_video(load_samples(DEFAULT_CHECKPOINT)).items()))
    frames = read_frames(video, 32)[None]
    clips = Clips(frames, *pack_questions([[item.question for item in items]]))
    visual = frame_tokens(trained(), frames).read
    right = answers_right(trained(), clips, visual, *visual_positions(torch.ones(1, 32), 14))
    assert right.all()


def test_a_plain_transformers_user_gets_an_answer() -> None:
    item = load_samples(DEFAULT_CHECKPOINT)[-1]
    processor = AutoProcessor.from_pretrained(DEFAULT_CHECKPOINT, local_files_only=True)
    text = {"type": "text", "text": item.question.text}
    chat = [{"role": "user", "content": [{"type": "video"}, text]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    frames = (read_frames(item.video, 32) * 255).to(torch.uint8)
    inputs = processor(text=prompt, videos=[frames.numpy()], return_tensors="pt")
    assert inputs["pixel_values_videos"].shape == (1, 32, 3, 224, 224)
    said = trained().generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(said, skip_special_tokens=True) == item.question.answer


def test_words_are_read_whatever_their_case_and_punctuation() -> None:
    tokenizer = make_tokenizer()
    plain = tokenizer("what color is the ring")["input_ids"]
    assert tokenizer("WHAT colour, is the Ring?!")["input_ids"] == plain
    assert tokenizer("flabbergasted")["input_ids"] == [vocabulary()["<unk>"]]
    assert tokenizer("<|im_start|>user <video>")["input_ids"] == [
        vocabulary()[token] for token in ("<|im_start|>", "user", "<video>")
    ]


def test_no_question_holds_an_unknown_word_or_is_too_long() -> None:
    tokenizer, unknown = make_tokenizer(), vocabulary()["<unk>"]
    for kind, wordings in TEMPLATES.items():
        for wording in wordings:
            for color, shape in zip(COLORS, SHAPES, strict=True):
                text = wording.format(color=color, shape=shape, a=color, b="red", end="last")
                answer = CHOICES[kind][0]
                assert unknown not in tokenizer(f"{text} {answer}")["input_ids"]
                ids, answer_at, _ = pack_questions([[Question(kind, text, answer, ())]])
                assert ids.shape[-1] == QUESTION_TOKENS
                prompt = tokenizer(f"{text}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
                assert ids[0, 0, : answer_at[0, 0]].tolist() == prompt


def test_shipped_files_are_small() -> None:
    for path in DEFAULT_CHECKPOINT.rglob("*"):
        limit = 300e3 if path.suffix == ".mp4" else 16e6
        assert not path.is_file() or path.stat().st_size <= limit, path


def test_a_folder_of_clips_is_completed_not_rewritten(tmp_path: Path) -> None:
    manifest = build("heldout", 1, tmp_path, processes=1)
    items = load(manifest)
    assert len(items) >= 8
    written_ns = items[0].video.stat().st_mtime_ns
    assert build("heldout", 1, tmp_path, processes=1) == manifest
    assert items[0].video.stat().st_mtime_ns == written_ns
    assert read_frames(items[0].video, 4).shape == (4, 3, 224, 224)


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_positions_are_stock_at_scale_one_and_shrink_with_it(scale: float) -> None:
    positions, start = visual_positions(torch.full((1, 3), scale), 14)
    n = 3 * 196
    assert positions.shape == (1, n + 1)
    assert positions[0, 0] == len(HEAD_TOKENS)
    assert float(start) == pytest.approx(len(HEAD_TOKENS) + n * scale + 1)
