"""A decoder in fixed shapes says what the stock model says, pruned inside or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from policies.graphs.buckets import Bucket
from policies.graphs.capture import GraphPool
from policies.graphs.decoder import StaticDecoder
from policies.hooks import ReductionHooks
from policies.prefill import VideoSpan
from stream.data import Budget, PatchGrid
from stream.errors import AttachError
from stream.plan import Plan
from stream.reducers.base import Reducer
from stream.registry import build_reducer
from stream.signals import Signals

from ..tiny_models import llava_onevision, qwen2_5_vl

GRID = PatchGrid(4, 3, 3)
BEFORE, TEXT, STEPS, KEPT = 3, 7, 5, 9
LENGTH = BEFORE + GRID.size + TEXT
BUCKET = Bucket(BEFORE, GRID.size, after=12, new=STEPS, budget=KEPT, grid=GRID)
ANCHOR = torch.arange(GRID.size)


def llama() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 200,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def parts(family: str) -> tuple[Any, Any]:
    """(text model, head)."""
    if family == "llama":
        model = llama()
        return model.model, model.lm_head
    whole = llava_onevision() if family == "llava" else qwen2_5_vl()
    return whole.model.language_model, whole.lm_head


def positions(family: str, length: int) -> Tensor:
    ids = torch.arange(length)[None]
    return ids.expand(4, 1, -1) if family == "qwen" else ids


def stock(
    text_model: Any, head: Any, family: str, stages: tuple[Reducer, ...], embeds: Tensor
) -> tuple[Tensor, list[int]]:
    """(logits of the prompt's end and of STEPS greedy tokens, tokens at each layer)."""
    said, lengths, _ = stock_with_cache(text_model, head, family, stages, embeds, STEPS)
    return said, lengths


def stock_with_cache(
    text_model: Any,
    head: Any,
    family: str,
    stages: tuple[Reducer, ...],
    embeds: Tensor,
    steps: int,
) -> tuple[Tensor, list[int], DynamicCache]:
    slots, length = torch.arange(BEFORE, BEFORE + GRID.size), embeds.shape[1]
    hooks = ReductionHooks(text_model, text_model.layers, stages, "keep")
    span = VideoSpan(slots, GRID, (0.0,) * 4, Budget(KEPT), Plan.identity(GRID.size), Signals({}))
    said = []
    with hooks:
        hooks.expect([[span]], text_from=BEFORE + GRID.size)
        cache = DynamicCache(config=text_model.config)
        for step in range(steps + 1):
            ids = positions(family, length + steps)
            ids = ids[..., :length] if step == 0 else ids[..., length + step - 1 : length + step]
            out = text_model(
                inputs_embeds=embeds, position_ids=ids, past_key_values=cache, use_cache=True
            )
            said.append(head(out.last_hidden_state[:, -1:]))
            embeds = text_model.get_input_embeddings()(said[-1].argmax(-1))
        return torch.cat(said, 1), hooks.lengths(), cache


@pytest.mark.parametrize("family", ["llava", "qwen", "llama"])
@pytest.mark.parametrize("names", [(), ("fastv",), ("vla_pruner",), ("fastv", "inner_merge")])
@torch.inference_mode()
def test_logits_and_layer_lengths_are_those_of_the_stock_model(
    family: str, names: tuple[str, ...]
) -> None:
    text_model, head = parts(family)
    stages = tuple(build_reducer(name) for name in names)
    embeds = torch.randn(1, LENGTH, 64) * 0.5
    expected, lengths = stock(text_model, head, family, stages, embeds)
    padded = torch.cat([embeds, torch.randn(1, BUCKET.length - LENGTH, 64)], 1)
    ids = positions(family, BUCKET.length)
    before = text_model.config._attn_implementation
    with StaticDecoder(text_model, head, [BUCKET], GraphPool("cpu"), stages=stages) as decoder:
        said = [decoder.prefill(BUCKET, padded, ids, torch.tensor([LENGTH]), ANCHOR[None])]
        for step in range(STEPS):
            assert torch.equal(decoder.token, expected[:, step].argmax(-1, keepdim=True))
            said.append(decoder.step(decoder.widths(BUCKET)))
    assert text_model.config._attn_implementation == before
    assert torch.allclose(torch.cat(said, 1), expected, atol=2e-6)
    assert [n + LENGTH - GRID.size for n in decoder.visual_tokens(BUCKET)] == lengths


@torch.inference_mode()
def test_rows_of_a_batch_do_not_touch_each_other() -> None:
    text_model, head = parts("llava")
    stages = (build_reducer("fastv"),)
    embeds = torch.randn(3, BUCKET.length, 64) * 0.5
    lengths = torch.tensor([LENGTH, LENGTH + 3, LENGTH - 2])
    ids = positions("llava", BUCKET.length).expand(3, -1)

    def run(rows: slice) -> Tensor:
        batch = len(range(3)[rows])
        with StaticDecoder(
            text_model, head, [BUCKET], GraphPool("cpu"), batch=batch, stages=stages
        ) as decoder:
            anchor = ANCHOR.expand(batch, -1)
            said = [decoder.prefill(BUCKET, embeds[rows], ids[rows], lengths[rows], anchor)]
            said += [decoder.step(decoder.widths(BUCKET)) for _ in range(3)]
        return torch.cat(said, 1)

    alone = torch.cat([run(slice(i, i + 1)) for i in range(3)])
    assert torch.allclose(run(slice(0, 3)), alone, atol=2e-6)


@torch.inference_mode()
def test_questions_behind_a_prefix_are_answered_as_if_alone() -> None:
    text_model, head = parts("llava")
    prefix = Bucket(BEFORE, GRID.size, after=1, new=16, budget=GRID.size, grid=GRID)
    start = torch.randn(1, prefix.length, 64) * 0.5
    ids = positions("llava", prefix.length)
    with StaticDecoder(text_model, head, [prefix], GraphPool("cpu")) as decoder:
        decoder.prefill(prefix, start, ids, torch.tensor([prefix.length]), ANCHOR[None])
        for seed in (1, 2):
            question = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(seed)) * 0.5
            expected, _ = stock(text_model, head, "llava", (), torch.cat([start, question], 1))
            padded = torch.cat([question, torch.randn(1, 4, 64)], 1)
            decoder.rewind()
            said = [decoder.extend(decoder.widths(prefix), padded, torch.tensor([6]))]
            said += [decoder.step(decoder.widths(prefix)) for _ in range(STEPS)]
            assert torch.allclose(torch.cat(said, 1), expected, atol=2e-6)


@torch.inference_mode()
def test_watched_layers_tell_where_prompt_and_actions_looked() -> None:
    text_model, head = parts("llama")
    embeds = torch.randn(1, LENGTH, 64) * 0.5
    stages = (build_reducer("fastv"),)
    bucket = Bucket(BEFORE, GRID.size, after=TEXT, new=STEPS, budget=KEPT, grid=GRID)
    pool, lengths, ids = GraphPool("cpu"), torch.tensor([LENGTH]), positions("llama", LENGTH)
    with StaticDecoder(text_model, head, [bucket], pool, stages=stages, watch=(4, 5)) as decoder:
        decoder.prefill(bucket, embeds, ids, lengths, ANCHOR[None])
        first = decoder.looked.clone()
        decoder.step(decoder.widths(bucket))
        both = decoder.looked.clone()
    kept, held = decoder.anchor[0, :KEPT], BEFORE + KEPT + TEXT
    assert bool((kept.diff() > 0).all())
    assert bool((first[0, :held] > 0).all())
    assert float(first[0, held:].abs().sum()) == 0.0
    assert bool((both[0, : held + 1] > first[0, : held + 1]).all())
    assert float(first.sum()) == pytest.approx(2.0)  # two layers, each row of attention sums to one
    assert float(both.sum()) == pytest.approx(4.0)


@torch.inference_mode()
def test_a_prompt_sees_itself_whole_where_actions_are_decoded_in_parallel() -> None:
    text_model, head = parts("llama")
    slots, length = 4, LENGTH + 4
    embeds = torch.randn(1, length, 64) * 0.5
    bucket = Bucket(BEFORE, GRID.size, TEXT + slots, 1, KEPT, GRID)
    ids, lengths = positions("llama", length), torch.tensor([length])
    with StaticDecoder(
        text_model, head, [bucket], GraphPool("cpu"), read=slots, watch=(2,), bidirectional=True
    ) as decoder:
        said = decoder.prefill(bucket, embeds, ids, lengths, ANCHOR[None])
    assert said.shape == (1, slots, 200)
    assert bool((decoder.looked[0, :length] > 0).all())
    for layer in text_model.layers:
        layer.self_attn.is_causal = False
    out = text_model(inputs_embeds=embeds, position_ids=ids)
    assert torch.allclose(said, head(out.last_hidden_state[:, -slots:]), atol=2e-6)


def test_what_does_not_fit_is_refused() -> None:
    text_model, head = parts("llama")
    pool = GraphPool("cpu")
    with pytest.raises(AttachError, match="acts at input"):
        StaticDecoder(text_model, head, [BUCKET], pool, stages=(build_reducer("saliency"),))
    with pytest.raises(AttachError, match="hold different tokens"):
        StaticDecoder(
            text_model, head, [BUCKET], pool, stages=(build_reducer("fastv"),), watch=(1, 4)
        )
    decoder = StaticDecoder(text_model, head, [BUCKET], pool)
    other = Bucket(1, 2, 3, 4, 5, GRID)
    with pytest.raises(AttachError, match="known buckets hold"):
        decoder.widths(other)
