"""A cache that follows a stream equals the prompt that an offline run would have prefilled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from policies import kvcache
from policies.hooks import Positions
from policies.live_cache import LiveCache
from policies.reasoner import VideoReasoner
from stream.data import Budget
from stream.errors import AttachError
from stream.live.values import joined
from stream.memory import Memory
from stream.pipeline import ReducedVideo, chunked, reduce_video
from stream.registry import build_reducer

from .test_reasoner import FRAMES, family

FAMILIES = ["llava_onevision", "qwen2_5_vl"]
OUTER = build_reducer("holitom", inner=None)


def reasoner_of(name: str, positions: Positions = "keep") -> VideoReasoner:
    return VideoReasoner(*family(name), OUTER, positions=positions, max_new_tokens=4)


def pieces(reasoner: VideoReasoner) -> list[ReducedVideo]:
    """FRAMES in four pieces of two frames, each reduced by itself."""
    made = []
    for chunk in chunked(iter(FRAMES), 2):
        video = reasoner.encode(chunk)
        budget = Budget.ratio(0.5, of=video.grid.size)
        made.append(reduce_video(video, OUTER, budget, Memory()))
    return made


def keys_and_values(cache: DynamicCache) -> list[torch.Tensor]:
    layers: list[Any] = cache.layers
    return [t for layer in layers for t in (layer.keys, layer.values)]


def same(a: DynamicCache, b: DynamicCache, atol: float = 1e-5) -> bool:
    pairs = zip(keys_and_values(a), keys_and_values(b), strict=True)
    return all(torch.allclose(x, y, atol=atol) for x, y in pairs)


def fresh(reasoner: VideoReasoner, videos: list[ReducedVideo]) -> LiveCache:
    cache = reasoner.live_cache()
    cache.hold(videos)
    return cache


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("name", FAMILIES)
def test_growing_piece_by_piece_equals_one_prefill_and_the_offline_answer(
    name: str, positions: Positions
) -> None:
    reasoner = reasoner_of(name, positions)
    made = pieces(reasoner)
    cache = reasoner.live_cache()
    for count in range(1, len(made) + 1):
        cache.hold(made[:count])
    assert same(cache._cache, fresh(reasoner, made)._cache)

    questions = ["what moves", "where is it now"]
    before = [t.clone() for t in keys_and_values(cache._cache)]
    for asked in (questions, questions[:1], questions):
        offline = reasoner.answer(joined(made), asked)
        online = cache.answer(asked, None)
        for one, two in zip(online.answers, offline.answers, strict=True):
            assert one.token_ids == two.token_ids
            assert one.confidence == pytest.approx(two.confidence, abs=1e-5)
    after = keys_and_values(cache._cache)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tail_is_answered_about_and_not_remembered(name: str) -> None:
    reasoner = reasoner_of(name)
    made = pieces(reasoner)
    cache = fresh(reasoner, made[:2])
    tokens = cache.tokens
    online = cache.answer(["what moves"], joined(made[2:]))
    offline = reasoner.answer(joined(made), ["what moves"])
    assert online.answers[0].token_ids == offline.answers[0].token_ids
    assert online.answers[0].confidence == pytest.approx(offline.answers[0].confidence, abs=1e-5)
    assert cache.tokens == tokens
    only_tail = reasoner.live_cache().answer(["what moves"], made[0])
    alone = reasoner.answer(made[0], ["what moves"])
    assert only_tail.answers[0].confidence == pytest.approx(alone.answers[0].confidence, abs=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_turned_keys_equal_a_prefill_at_the_new_positions(name: str) -> None:
    """Attention sees differences of positions only, so a whole prompt can be moved exactly."""
    reasoner = reasoner_of(name)
    text_model = reasoner.adapter.text_model
    prompt = reasoner.prompt(joined(pieces(reasoner)), ["what"])

    def prefill(position: torch.Tensor) -> DynamicCache:
        cache = DynamicCache(config=text_model.config)
        text_model(
            inputs_embeds=prompt.embeds,
            attention_mask=prompt.mask,
            position_ids=position,
            past_key_values=cache,
        )
        return cache

    with torch.inference_mode():
        moved = prefill(prompt.position_ids)
        shift = torch.full((prompt.embeds.shape[1],), 37)
        axes = shift.expand(3, -1) if name == "qwen2_5_vl" else shift
        kvcache.turn(text_model, moved, axes)
        assert same(moved, prefill(prompt.position_ids + 37))
        kvcache.turn(text_model, moved, -axes)
        assert same(moved, prefill(prompt.position_ids))


@pytest.mark.parametrize("reanchor", ["rotate", "refill"])
@pytest.mark.parametrize("leaving", [0, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_stays_moves_to_where_a_fresh_window_would_have_it(
    name: str, leaving: int, reanchor: str
) -> None:
    reasoner = reasoner_of(name)
    made = pieces(reasoner)
    cache = reasoner.live_cache(reanchor)
    cache.hold(made)
    rest = [v for i, v in enumerate(made) if i != leaving]
    cache.hold(rest)
    wanted = fresh(reasoner, rest)._cache
    if reanchor == "refill":
        assert same(cache._cache, wanted)
        return
    first, aim = cache._cache.layers[0], wanted.layers[0]
    assert torch.allclose(first.keys, aim.keys, atol=1e-5)
    assert torch.allclose(first.values, aim.values, atol=1e-5)
    assert not same(cache._cache, wanted), "later layers remember what left"
    assert cache.answer(["what"], None).answers


def test_rotary_embeddings_that_depend_on_the_length_are_refilled() -> None:
    reasoner = reasoner_of("llava_onevision")
    text_model: Any = reasoner.adapter.text_model
    text_model.rotary_emb.rope_type = "dynamic"
    made = pieces(reasoner)
    cache = reasoner.live_cache("rotate")
    cache.hold(made)
    with pytest.raises(AttachError, match="set reanchor to refill"):
        kvcache.turn(text_model, cache._cache, torch.zeros(cache.tokens, dtype=torch.long))
    cache.hold(made[1:])
    assert same(cache._cache, fresh(reasoner, made[1:])._cache)
