"""Answers in fixed-shape steps are those of transformers' own loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from weakref import ref

import pytest
import torch

from policies.graphs import greedy
from policies.graphs.staged import StagedDecoder
from policies.graphs.wanted import Capture
from policies.hooks import Positions
from policies.models import load
from policies.reasoner import VideoReasoner
from stream.data import Budget
from stream.errors import AttachError
from stream.memory import Memory
from stream.pipeline import ReducedVideo, Reply, reduce_video
from stream.plan import Plan
from stream.registry import build_reducer

from ..test_reasoner import FRAMES, family
from .taped import TapedPool

FAMILIES = ["llava_onevision", "qwen2_5_vl"]
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "identity": ("identity", {}),
    "holitom": ("holitom", {}),
    "holitom_outer": ("holitom", {"inner": None}),
    "fastv": ("fastv", {}),
}
QUESTIONS = ["what moves", "where is it now where is it", "it moves now"]


class Pair:
    """One model answering with transformers' loop and in fixed-shape steps."""

    def __init__(
        self, parts: tuple[Any, Any], method: str = "holitom_outer", **options: Any
    ) -> None:
        self.model = parts[0]
        name, settings = METHODS[method]
        reducer = build_reducer(name, **settings)

        def reasoner(capture: Capture) -> VideoReasoner:
            return VideoReasoner(
                *parts, reducer, capture=capture, **{"max_new_tokens": 5} | options
            )

        self.stock, self.fixed = reasoner("off"), reasoner("on")
        encoded = self.stock.encode(FRAMES)
        budget = Budget.ratio(0.4, of=encoded.grid.size)
        self.video: ReducedVideo = reduce_video(encoded, reducer, budget, Memory())

    def same(self, questions: Sequence[str]) -> Reply:
        expected = self.stock.answer(self.video, questions)
        return same(self.fixed.answer(self.video, questions), expected)

    @property
    def shapes(self) -> list[StagedDecoder]:
        assert self.fixed._steps is not None
        return list(self.fixed._steps._behind.values())

    @property
    def counts(self) -> tuple[int, int, int]:
        """Programs of parts of prefills, of texts behind them, of steps."""
        kept = [(len(c.programs), len(c._texts), len(c._steps)) for c in self.shapes]
        parts, texts, steps = map(sum, zip(*kept, strict=True))
        return parts, texts, steps

    @property
    def programs(self) -> int:
        return sum(self.counts)


def same(reply: Reply, expected: Reply, atol: float = 1e-5) -> Reply:
    for one, other in zip(reply.answers, expected.answers, strict=True):
        assert (one.text, one.token_ids) == (other.text, other.token_ids)
        assert one.confidence == pytest.approx(other.confidence, abs=atol)
    for plan, wanted in zip(reply.plans, expected.plans, strict=True):
        assert plan.same_as(wanted)
    assert reply.layer_tokens == expected.layer_tokens
    assert reply.timings_ms.keys() == expected.timings_ms.keys()
    return reply


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_replies_are_those_of_the_stock_loop(name: str, method: str, positions: Positions) -> None:
    pair = Pair(family(name), method, positions=positions)
    alone = pair.same(QUESTIONS[:1])
    assert len(alone.answers[0].token_ids) == 5
    inside = method in ("holitom", "fastv")
    parts = 2 if inside else 1
    assert pair.counts == (parts, 0, 1)
    pair.same(QUESTIONS)
    assert pair.counts[1:] == ((0, 2) if inside else (1, 2))
    assert pair.counts[0] == 4 if inside else pair.counts[0] in (1, 2), "one may fit both"
    counts = alone.layer_tokens
    assert (counts[0] > counts[-1]) == inside


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_long_prompts_are_prefilled_by_transformers(
    name: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(greedy, "PREFILLED", 4)
    pair = Pair(family(name), method)
    pair.same(QUESTIONS[:1])
    assert pair.counts == (0, 0, 1), "a prompt that is prefilled whole needs the steps alone"
    pair.same(QUESTIONS)
    assert pair.counts == ((0, 0, 2) if method in ("holitom", "fastv") else (0, 1, 2))


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_streams_cache_is_asked_and_left_as_it_is(name: str, positions: Positions) -> None:
    pair = Pair(family(name), positions=positions)
    caches = [reasoner.live_cache() for reasoner in (pair.stock, pair.fixed)]
    for cache in caches:
        cache.hold([pair.video])
    for questions in (QUESTIONS[:1], QUESTIONS, QUESTIONS[1:2]):
        for tail in (None, pair.video):
            expected, reply = (cache.answer(questions, tail) for cache in caches)
            same(reply, expected)
    assert caches[0].tokens == caches[1].tokens
    one, other = (cache._cache.layers[-1].keys for cache in caches)
    assert torch.equal(one, other)


@pytest.mark.parametrize("method", METHODS)
def test_each_answer_ends_at_its_own_end(method: str) -> None:
    pair = Pair(family("llava_onevision"), method)
    whole = pair.same(QUESTIONS).answers
    ends = [whole[0].token_ids[1], whole[1].token_ids[3]]
    pair.model.generation_config.eos_token_id = ends
    for questions in (QUESTIONS[:1], QUESTIONS):
        answers = pair.same(questions).answers
        assert len(answers[0].token_ids) <= 1
        for answer in answers:
            assert not set(answer.token_ids) & set(ends)


@pytest.mark.parametrize("questions", [QUESTIONS[:1], QUESTIONS])
def test_one_token(questions: list[str]) -> None:
    pair = Pair(family("qwen2_5_vl"), max_new_tokens=1)
    assert [len(a.token_ids) for a in pair.same(questions).answers] == [1] * len(questions)


def test_settings_of_the_model_for_generation_hold() -> None:
    """LLaVA-OneVision and Qwen2.5-VL come with a penalty on repetition."""
    pair = Pair(family("llava_onevision"), max_new_tokens=12)
    free = pair.same(QUESTIONS)
    pair.model.generation_config.repetition_penalty = 3.0
    bound = pair.same(QUESTIONS)
    assert free.answers != bound.answers


def test_a_listener_follows_and_ends_an_answer() -> None:
    pair = Pair(family("llava_onevision"))
    heard: dict[str, list[tuple[int, ...]]] = {"stock": [], "fixed": []}

    def reply(which: str) -> Reply:
        def listener(token_ids: Sequence[int]) -> bool:
            heard[which].append(tuple(token_ids))
            return len(token_ids) == 3

        reasoner: VideoReasoner = getattr(pair, which)
        with reasoner.generating(8, listener):
            return reasoner.answer(pair.video, QUESTIONS)

    same(reply("fixed"), reply("stock"))
    assert heard["fixed"] == heard["stock"]
    assert [len(ids) for ids in heard["fixed"]] == [1, 2, 3]


@pytest.mark.parametrize("questions", [QUESTIONS[1:2], QUESTIONS])
def test_an_answer_within_an_answer_is_refused(questions: list[str]) -> None:
    pair = Pair(family("llava_onevision"), "identity")
    other = replace(pair.video, x=-pair.video.x)
    pair.same(QUESTIONS)

    def listener(token_ids: Sequence[int]) -> bool:
        with pytest.raises(AttachError, match="pruned already"):
            pair.fixed.answer(other, questions)
        return False

    expected = pair.stock.answer(pair.video, QUESTIONS[:1])
    with pair.fixed.generating(5, listener):
        same(pair.fixed.answer(pair.video, QUESTIONS[:1]), expected)


def test_another_question_runs_the_same_programs() -> None:
    pair = Pair(family("llava_onevision"))
    cache = pair.fixed.live_cache()
    cache.hold([pair.video])
    for question in QUESTIONS:
        cache.answer([question], None)
    assert (len(pair.shapes), pair.programs) == (1, 2)
    cache.answer([" ".join(QUESTIONS * 4)], None)
    assert (len(pair.shapes), pair.programs) == (1, 3), "a longer text is a program of its own"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_replayed_operators_do_without_python(
    name: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(greedy, "GraphPool", TapedPool)
    pair = Pair(family(name), method)
    asked = [QUESTIONS[:1], QUESTIONS, QUESTIONS[1:2], QUESTIONS[::-1], QUESTIONS[2:]]
    for questions in asked:
        pair.same(questions)
    assert sum(c.pool.captured for c in pair.shapes) == pair.programs > 1
    if method == "holitom_outer":
        caches = [reasoner.live_cache() for reasoner in (pair.stock, pair.fixed)]
        for cache in caches:
            cache.hold([pair.video])
        for questions in asked:
            expected, reply = (cache.answer(questions, None) for cache in caches)
            same(reply, expected)


def test_what_comes_once_is_not_captured_and_what_comes_again_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(greedy, "GraphPool", TapedPool)
    pair = Pair(family("llava_onevision"), "fastv")

    def captured() -> int:
        return sum(c.pool.captured for c in pair.shapes)

    asked = [QUESTIONS[:1] * n for n in range(1, 7)]
    counts = []
    for _ in range(3):
        for questions in asked:
            pair.same(questions)
        counts.append(captured())
    assert len(pair.shapes) == 6
    assert counts == [0, pair.programs, pair.programs]


@pytest.mark.parametrize("method", ["identity", "fastv"])
def test_sizes_that_are_padded_alike_share_what_does_not_differ(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is captured at its first sight, though its shape may be known."""
    monkeypatch.setattr(greedy, "GraphPool", TapedPool)
    pair = Pair(family("llava_onevision"), method)
    grid = pair.video.grid
    whole = [torch.arange(k) for k in range(grid.size - 12, grid.size)]
    videos = [
        replace(
            pair.video,
            x=pair.video.x[: len(kept)] if method == "identity" else pair.video.x[kept],
            plan=Plan.keep(kept, grid.size),
        )
        for kept in whole
        if len(kept) <= len(pair.video.x)
    ]
    for _ in range(2):
        for video in videos:
            expected = pair.stock.answer(video, QUESTIONS[:1])
            same(pair.fixed.answer(video, QUESTIONS[:1]), expected)
        parts = pair.counts[0]
        if method == "identity":
            assert parts == len(pair.shapes) < len(videos)
    assert sum(c.pool.captured for c in pair.shapes) == pair.programs


def test_buffers_that_are_kept_share_a_room(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(family("llava_onevision"), "fastv")
    pair.same(QUESTIONS[:1])
    monkeypatch.setattr(greedy, "KEPT_BYTES", 3 * pair.shapes[0].cache.bytes)
    pair = Pair(family("llava_onevision"), "fastv")
    for n in (1, 2, 3, 1):
        pair.same(QUESTIONS[:1] * n)
    assert [c.token.shape[0] for c in pair.shapes] == [1]
    pair.same(QUESTIONS[:1] * 2)
    assert [c.token.shape[0] for c in pair.shapes] == [1, 2]


def test_the_longest_unused_shape_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy, "KEPT", 2)
    pair = Pair(family("llava_onevision"), "fastv")
    pair.same(QUESTIONS[:1])
    first = ref(pair.shapes[0])
    pair.same(QUESTIONS[:2])
    pair.same(QUESTIONS[:1])
    pair.same(QUESTIONS)
    assert [c.token.shape[0] for c in pair.shapes] == [1, 3]
    assert pair.shapes[0] is first()
    pair.same(QUESTIONS[:2])
    assert [c.token.shape[0] for c in pair.shapes] == [3, 2]
    assert first() is None, "nothing holds the buffers of what went, not even for a while"


def test_layers_that_forget_stay_with_the_stock_loop() -> None:
    parts = family("llava_onevision")
    text = parts[0].model.language_model.config
    text.layer_types = ["sliding_attention", *text.layer_types[1:]]
    assert VideoReasoner(*parts, build_reducer("identity"), capture="on")._steps is None


def test_a_cpu_decodes_as_transformers_does_unless_told() -> None:
    reducer = build_reducer("identity")
    assert VideoReasoner(*family("llava_onevision"), reducer)._steps is None


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_captured_answers_on_a_gpu_are_those_of_the_stock_loop(method: str) -> None:
    pair = Pair(load("tiny-video", "cuda", torch.float32), method, max_new_tokens=8)
    pair.model.generation_config.eos_token_id = None
    for _ in range(2):
        for questions in (QUESTIONS[:1], QUESTIONS):
            expected = pair.stock.answer(pair.video, questions)
            same(pair.fixed.answer(pair.video, questions), expected, atol=1e-3)
    pools = [c.pool for c in pair.shapes]
    assert not any(pool.fallen_back for pool in pools)
    assert sum(pool.captured for pool in pools) == pair.programs > 0
