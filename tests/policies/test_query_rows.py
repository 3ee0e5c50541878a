"""Which prompt rows a signal is the mean of, by hand and on decoders of Llama's shape."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
    SmolLM3Config,
    SmolLM3Model,
)

from policies.hooks import ReductionHooks
from policies.prefill import VideoSpan
from policies.query_rows import ROW_SIGNALS, QueryRows
from stream.data import Budget, PatchGrid
from stream.errors import AttachError
from stream.plan import Plan
from stream.reducers.fastv import FastV
from stream.reducers.vla_pruner import VLAPruner, query_rows
from stream.signals import Signal, Signals
from tests.policies.oracle import watching
from tests.policies.tiny_models import TEXT

FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaModel, LlamaConfig),
    "qwen2": (Qwen2Model, Qwen2Config),
    "qwen3": (Qwen3Model, Qwen3Config),
    "smollm3": (SmolLM3Model, SmolLM3Config),
}
GRID = PatchGrid(2, 2, 3)
"""Two cameras of 2 x 3 patches, 12 tokens."""
SEMANTICS = {
    "last": Signal.LAST_ROW,
    "prefill": Signal.PREFILL_ROWS,
    "text": Signal.TEXT_ROWS,
}


@cache
def decoder(family: str, eager: bool = False) -> Any:
    torch.manual_seed(0)
    model, config = FAMILIES[family]
    how = {"attn_implementation": "eager" if eager else "sdpa", "pad_token_id": 0}
    return model(config(**TEXT, head_dim=16, **how)).eval()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def places(rows: Tensor, taken: Tensor, row: int) -> list[int]:
    return rows[row][taken[row]].tolist()


def span(first: int, grid: PatchGrid = GRID, keep: int = 4) -> VideoSpan:
    slots = torch.arange(first, first + grid.size)
    times = tuple(float(t) for t in range(grid.frames))
    return VideoSpan(slots, grid, times, Budget(keep), Plan.identity(grid.size), Signals({}))


# ---------------------------------------------------------------- by hand


def test_rows_of_two_prompts_behind_padding() -> None:
    """Sequence 0: BOS, 3 visual, 5 text. Sequence 1: 2 of padding, BOS, 3 visual, 3 text."""
    prompt = torch.ones(2, 9, dtype=torch.bool)
    prompt[1, :2] = False
    queries = QueryRows.of(prompt, torch.tensor([3, 5]), tail=5)
    last = queries.behind(Signal.LAST_ROW)
    assert last[0].tolist() == [[8], [8]]
    every = queries.behind(Signal.PREFILL_ROWS)
    assert places(*every, 0) == list(range(9))
    assert places(*every, 1) == list(range(2, 9))
    text = queries.behind(Signal.TEXT_ROWS)
    assert places(*text, 0) == [5, 6, 7]
    assert places(*text, 1) == [7]
    assert text[0].shape == (2, 6)  # no more rows than the tail are looked at

    left = queries.at(torch.tensor([[0, 2, 4, 5, 6, 7, 8], [0, 1, 2, 5, 6, 7, 8]]))
    assert places(*left.behind(Signal.PREFILL_ROWS), 1) == [2, 3, 4, 5, 6]
    assert places(*left.behind(Signal.TEXT_ROWS), 0) == [3, 4, 5]
    assert places(*left.behind(Signal.TEXT_ROWS), 1) == [5]


@pytest.mark.parametrize(
    ("text", "expected"), [(0, [3]), (1, [4]), (2, [4, 5]), (3, [5]), (4, [5, 6])]
)
def test_short_texts_are_taken_whole(text: int, expected: list[int]) -> None:
    prompt = torch.ones(1, 4 + text, dtype=torch.bool)
    queries = QueryRows.of(prompt, torch.tensor([3]), tail=text)
    assert places(*queries.behind(Signal.TEXT_ROWS), 0) == expected


@pytest.mark.parametrize("signal", sorted(ROW_SIGNALS))
def test_slots_of_actions_are_no_rows_of_the_prompt(signal: Signal) -> None:
    """BOS, 3 visual, 4 text, then 3 actions that are decoded in parallel."""
    prompt = torch.ones(1, 11, dtype=torch.bool)
    prompt[:, 8:] = False
    queries = QueryRows.of(prompt, torch.tensor([3]), tail=7)
    rows = {
        Signal.LAST_ROW: [7],
        Signal.PREFILL_ROWS: list(range(8)),
        Signal.TEXT_ROWS: [5, 6],
    }
    assert places(*queries.behind(signal), 0) == rows[signal]


@given(st.integers(1, 6), st.integers(1, 9), st.sampled_from(sorted(SEMANTICS)))
def test_rows_are_those_that_vla_pruner_names(visual: int, text: int, semantic: Any) -> None:
    n = 1 + visual + text
    queries = QueryRows.of(torch.ones(1, n, dtype=torch.bool), torch.tensor([visual]), tail=text)
    named = query_rows(semantic, visual_stop=1 + visual, length=n)
    assert places(*queries.behind(SEMANTICS[semantic]), 0) == list(range(n))[named]


# ---------------------------------------------------------------- on decoders


def run(family: str, semantic: str, x: Tensor, spans: list[list[VideoSpan]], **how: Any) -> Any:
    """What the one stage of every span saw, and the hidden states of the pruned run."""
    text_from = how.pop("text_from")
    prompt = how.pop("prompt", None)
    model = decoder(family)
    reducer = VLAPruner(layer=2, semantic=semantic)
    hooks = ReductionHooks(model, model.layers, (reducer,), "keep")
    with torch.no_grad(), watching() as seen, hooks:
        hooks.expect(spans, text_from, prompt)
        hidden = model(inputs_embeds=x, use_cache=False, **how).last_hidden_state
    return seen, hidden


def eager_maps(family: str, x: Tensor, **how: Any) -> Tensor:
    """Attention of layer 1, mean over heads, [b, n, n]."""
    with torch.no_grad():
        out = decoder(family, eager=True)(inputs_embeds=x, output_attentions=True, **how)
    return out.attentions[1].mean(1)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("semantic", sorted(SEMANTICS))
def test_signals_equal_eager_rows(family: str, semantic: str) -> None:
    """Two prompts behind padding of 0 and 3; one grid of two cameras, then a third camera."""
    x, mask = drawn(2, 30, 64), torch.ones(2, 30, dtype=torch.long)
    mask[1, :3] = 0
    wrist = PatchGrid(1, 2, 2)
    spans = [
        [span(1), span(14, wrist, 2)],
        [span(5), span(19, wrist, 2)],  # text of 12 and of 7 rows
    ]
    seen, _ = run(family, semantic, x, spans, attention_mask=mask, text_from=18)
    maps = eager_maps(family, x, attention_mask=mask)
    rows = {
        "last": ([29], [29]),
        "prefill": (list(range(30)), list(range(3, 30))),
        "text": (list(range(19, 29)), list(range(24, 29))),
    }[semantic]
    assert len(seen) == 4
    for one, (row, first) in zip(seen, [(0, 1), (0, 14), (1, 5), (1, 19)], strict=True):
        at = torch.arange(first, first + one.tokens.n)
        got = one.signals[SEMANTICS[semantic]]
        assert torch.allclose(got, maps[row, rows[row]].mean(0)[at], atol=1e-6)
        assert torch.equal(one.signals[Signal.INPUT_EMBEDDINGS], x[row, at])
        assert not torch.equal(one.tokens.x, x[row, at])
        assert one.plan.k < one.plan.n


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("semantic", sorted(SEMANTICS))
def test_a_prompt_may_end_before_its_actions(family: str, semantic: str) -> None:
    """Action slots look at one another both ways; their rows count nowhere, and stay."""
    x = drawn(1, 27, 64)
    seen_by = torch.ones(27, 27, dtype=torch.bool).tril()
    seen_by[20:, 20:] = True
    prompt = torch.arange(27)[None] < 20
    mask = seen_by[None, None]
    seen, hidden = run(
        family, semantic, x, [[span(1)]], attention_mask=mask, text_from=13, prompt=prompt
    )
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    maps = eager_maps(family, x, attention_mask=added)
    rows = {"last": [19], "prefill": list(range(20)), "text": list(range(14, 19))}[semantic]
    (one,) = seen
    expected = maps[0, rows].mean(0)[1:13]
    assert torch.allclose(one.signals[SEMANTICS[semantic]], expected, atol=1e-6)
    assert hidden.shape[1] == 27 - 12 + 4

    kept = torch.cat([torch.tensor([0]), 1 + one.plan.anchor, torch.arange(13, 27)])
    dropped = ~torch.isin(torch.arange(27), kept)
    hide = seen_by & ~dropped | torch.eye(27, dtype=torch.bool)
    layers = decoder(family, eager=True).layers
    below = torch.zeros(1, 1, 27, 27).masked_fill(~hide, torch.finfo(torch.float32).min)
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"attention_mask": below}),
            with_kwargs=True,
        )
        for layer in layers[2:]
    ]
    with torch.no_grad():
        truth = decoder(family, eager=True)(inputs_embeds=x, attention_mask=added)
    for hook in hooks:
        hook.remove()
    assert torch.allclose(hidden[0], truth.last_hidden_state[0, kept], atol=1e-5)


def test_tokens_may_leave_before_a_model_with_a_mask_for_every_row() -> None:
    """A 4-D mask loses rows and columns together."""
    x, model = drawn(1, 16, 64), decoder("llama")
    mask = torch.ones(16, 16, dtype=torch.bool).tril()
    mask[12:, 12:] = True
    first = VLAPruner(layer=None, semantic="last")
    known = span(1)
    known = VideoSpan(
        known.slots,
        known.grid,
        known.pts_s,
        known.budget,
        known.plan,
        Signals({Signal.LAST_ROW: drawn(12, seed=3).softmax(0)}),
    )
    hooks = ReductionHooks(model, model.layers, (first, FastV(layer=2)), "keep")
    with torch.no_grad(), watching() as seen, hooks:
        hooks.expect([[known]], text_from=13)
        out = model(inputs_embeds=x, attention_mask=mask[None, None], use_cache=False)
    kept = torch.cat([torch.tensor([0]), 1 + seen[0].plan.anchor, torch.arange(13, 16)])
    with torch.no_grad():
        short = model(
            inputs_embeds=x[:, kept],
            attention_mask=mask[kept][:, kept][None, None],
            position_ids=kept[None],
        )
    assert torch.allclose(out.last_hidden_state, short.last_hidden_state, atol=1e-5)


def test_a_prompt_of_another_length_is_refused() -> None:
    short = torch.ones(1, 9, dtype=torch.bool)
    with pytest.raises(AttachError, match=r"`prompt` is \(1, 9\) for a prefill of \(1, 30\)"):
        run("llama", "text", drawn(1, 30, 64), [[span(1)]], text_from=13, prompt=short)
