"""What follows a prefix that the stock model prefilled, pruned inside or not."""

from __future__ import annotations

import pytest
import torch

from policies.graphs.capture import GraphPool
from policies.graphs.continuation import Continuation, sections_of
from stream.registry import build_reducer

from .test_decoder import (
    BEFORE,
    KEPT,
    LENGTH,
    STEPS,
    TEXT,
    parts,
    positions,
    stock_with_cache,
)

WIDTH = 64


@pytest.mark.parametrize("family", ["llava", "qwen", "llama"])
@pytest.mark.parametrize("names", [(), ("fastv",), ("fastv", "inner_merge")])
@torch.inference_mode()
def test_steps_behind_an_adopted_prefix_are_those_of_the_stock_model(
    family: str, names: tuple[str, ...]
) -> None:
    text_model, head = parts(family)
    stages = tuple(build_reducer(name) for name in names)
    embeds = torch.randn(1, LENGTH, 64) * 0.5
    expected, _, _ = stock_with_cache(text_model, head, family, stages, embeds, STEPS)
    first, _, cache = stock_with_cache(text_model, head, family, stages, embeds, 0)
    sections = sections_of(cache)
    assert len(sections) == 1 + len(names)
    assert not names or cache.layers[-1].get_seq_length() <= BEFORE + KEPT + TEXT
    widths = (WIDTH,) * len(sections)
    position = positions(family, LENGTH + 1)[1:, :, -1:] if family == "qwen" else None
    position = torch.tensor([[LENGTH]]) if position is None else position
    with Continuation(text_model, head, sections, widths, GraphPool("cpu")) as behind:
        for _ in range(2):
            behind.adopt(cache, position)
            behind.token.copy_(first[:, -1].argmax(-1, keepdim=True))
            said = torch.cat([behind.step(widths) for _ in range(STEPS)], 1)
            assert torch.allclose(said, expected[:, 1:], atol=2e-6)


@torch.inference_mode()
def test_texts_behind_an_adopted_prefix_are_read_as_if_prefilled_with_it() -> None:
    text_model, head = parts("llama")
    embeds, texts = torch.randn(1, LENGTH, 64) * 0.5, torch.randn(2, 6, 64) * 0.5
    _, _, cache = stock_with_cache(text_model, head, "llama", (), embeds, 0)
    cache.batch_repeat_interleave(2)
    widths = (WIDTH,)
    with Continuation(
        text_model, head, sections_of(cache), widths, GraphPool("cpu"), batch=2, read=2, watch=(3,)
    ) as behind:
        behind.adopt(cache, torch.full((2, 1), LENGTH))
        said = behind.extend(widths, texts, torch.tensor([6, 4]))
        looked = behind.looked.clone()
    for i, n in enumerate((6, 4)):
        whole = torch.cat([embeds, texts[i : i + 1, :n]], 1)
        ids = positions("llama", LENGTH + n)
        hidden = text_model(inputs_embeds=whole, position_ids=ids).last_hidden_state
        assert torch.allclose(said[i], head(hidden[0, -2:]), atol=2e-6)
        assert float(looked[i, : LENGTH + n].sum()) == pytest.approx(1.0)
        assert bool((looked[i, : LENGTH + n] > 0).all())
        assert float(looked[i, LENGTH + n :].sum()) == 0.0


@torch.inference_mode()
def test_rows_decoded_in_parallel_see_each_other_whole() -> None:
    text_model, head = parts("llama")
    embeds, rows = torch.randn(1, LENGTH, 64) * 0.5, torch.randn(1, 5, 64) * 0.5
    _, _, cache = stock_with_cache(text_model, head, "llama", (), embeds, 0)
    widths = (WIDTH,)

    def said(rows: torch.Tensor) -> torch.Tensor:
        with Continuation(
            text_model,
            head,
            sections_of(cache),
            widths,
            GraphPool("cpu"),
            read=5,
            bidirectional=True,
        ) as behind:
            behind.adopt(cache, torch.tensor([[LENGTH]]))
            return behind.extend(widths, rows, torch.tensor([5])).clone()

    other = rows.clone()
    other[:, -1] += 1.0
    assert bool(((said(rows) - said(other))[:, 0].abs() > 1e-6).any())


@torch.inference_mode()
def test_passes_leave_the_models_attention_as_it_was() -> None:
    text_model, head = parts("llama")
    embeds = torch.randn(1, LENGTH, 64) * 0.5
    _, _, cache = stock_with_cache(text_model, head, "llama", (), embeds, 0)
    before, widths = text_model.config._attn_implementation, (WIDTH,)
    behind = Continuation(
        text_model, head, sections_of(cache), widths, GraphPool("cpu"), watch=(3,)
    )
    behind.adopt(cache, torch.tensor([[LENGTH]]))
    alone = behind.step(widths)
    assert text_model.config._attn_implementation == before
    assert float(behind.looked.sum()) == pytest.approx(1.0)
    with behind:
        during = text_model.config._attn_implementation
        behind.adopt(cache, torch.tensor([[LENGTH]]))
        behind.token.zero_()
        assert torch.equal(behind.step(widths), alone)
        assert text_model.config._attn_implementation == during != before
    assert text_model.config._attn_implementation == before
