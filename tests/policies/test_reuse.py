"""Rows that keep their keys and values of before, against whole prefills."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from policies.reuse import prefill_reusing
from stream.errors import AttachError
from tests.policies.test_query_rows import FAMILIES, decoder, drawn

N, VISUAL = 20, torch.arange(1, 13)
"""BOS, 12 visual tokens, 7 of text."""
TEXT = torch.tensor([0, *range(13, N)])


def whole(model: Any, x: Tensor) -> tuple[Tensor, DynamicCache]:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        out = model(inputs_embeds=x, past_key_values=cache, use_cache=True)
    return out.last_hidden_state, cache


def reusing(model: Any, x: Tensor, anew: Tensor, before: DynamicCache) -> Any:
    with torch.no_grad():
        return prefill_reusing(model, x, anew.expand(len(x), -1), before)


def largest_difference(a: DynamicCache, b: DynamicCache) -> float:
    pairs = [
        pair
        for one, two in zip(a.layers, b.layers, strict=True)
        for pair in ((one.keys, two.keys), (one.values, two.values))
    ]
    return max(float((one - two).abs().max()) for one, two in pairs)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("batch", [1, 2])
def test_an_identical_prompt_has_no_error_whatever_is_reused(family: str, batch: int) -> None:
    model, x = decoder(family), drawn(batch, N, 64)
    hidden, before = whole(model, x)
    for anew in (TEXT, torch.cat([TEXT, VISUAL[::3]]).sort().values, torch.tensor([N - 1])):
        ours, cache = reusing(model, x, anew, before)
        assert torch.allclose(ours, hidden[:, anew], atol=1e-5)
        assert largest_difference(cache, before) < 1e-5
        following = drawn(batch, 2, 64, seed=1)  # decoding goes on from either
        with torch.no_grad():
            mine, theirs = (
                model(inputs_embeds=following, past_key_values=c).last_hidden_state
                for c in (cache, whole(model, x)[1])
            )
        assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_reusing_nothing_is_a_whole_prefill_whatever_was_before(family: str) -> None:
    model, x = decoder(family), drawn(1, N, 64)
    _, before = whole(model, drawn(1, N, 64, seed=5))
    ours, cache = reusing(model, x, torch.arange(N), before)
    hidden, truth = whole(model, x)
    assert torch.allclose(ours, hidden, atol=1e-5)
    assert largest_difference(cache, truth) < 1e-5


def test_a_changed_last_patch_that_is_computed_leaves_no_error() -> None:
    """Rows before it saw nothing of it, rows behind it are computed."""
    model, x = decoder("llama"), drawn(1, N, 64)
    _, before = whole(model, x)
    moved = x.clone()
    moved[0, 12] = drawn(64, seed=9)
    hidden, _ = whole(model, moved)
    ours, _ = reusing(model, moved, torch.arange(12, N), before)
    assert torch.allclose(ours, hidden[:, 12:], atol=1e-5)
    stale, _ = reusing(model, moved, torch.arange(13, N), before)
    assert not torch.allclose(stale, hidden[:, 13:], atol=1e-3)


def test_sequences_of_a_batch_reuse_their_own_rows_behind_their_own_padding() -> None:
    model, x = decoder("llama"), drawn(2, N, 64)
    pads = torch.tensor([[0], [3]])
    shown = torch.arange(N) >= pads
    position = (torch.arange(N) - pads).clamp_min(0)
    changed = x.clone()
    changed[0, 12], changed[1, 10] = drawn(2, 64, seed=7)
    how = {"attention_mask": shown, "position_ids": position}
    before, truth = (DynamicCache(config=model.config) for _ in range(2))
    anew = torch.tensor([[*range(12, N), 0, 1], [*range(10, N)]]).sort(1).values
    with torch.no_grad():
        model(inputs_embeds=x, past_key_values=before, **how)
        hidden = model(inputs_embeds=changed, past_key_values=truth, **how).last_hidden_state
        ours, cache = prefill_reusing(model, changed, anew, before, position, shown)
    assert torch.allclose(ours, hidden.take_along_dim(anew[..., None], 1), atol=1e-5)
    for one, two in zip(cache.layers, truth.layers, strict=True):
        assert torch.allclose(one.keys[0], two.keys[0], atol=1e-5)
        assert torch.allclose(one.keys[1, :, 3:], two.keys[1, :, 3:], atol=1e-5)


def test_what_is_reused_is_what_it_was_and_before_stays() -> None:
    model = decoder("llama")
    _, before = whole(model, drawn(1, N, 64))
    kept = [(layer.keys.clone(), layer.values.clone()) for layer in before.layers]
    anew = torch.cat([TEXT, VISUAL[:6]]).sort().values
    _, cache = reusing(model, drawn(1, N, 64, seed=3), anew, before)
    for layer, now, (keys, values) in zip(before.layers, cache.layers, kept, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
        assert torch.equal(now.keys[..., VISUAL[6:], :], keys[..., VISUAL[6:], :])
        assert not torch.allclose(now.keys[..., VISUAL[:6], :], keys[..., VISUAL[:6], :])


def test_entries_behind_the_prompt_are_left_out_and_a_short_cache_is_refused() -> None:
    model, x = decoder("llama"), drawn(1, N, 64)
    hidden, _ = whole(model, x)
    _, longer = whole(model, torch.cat([x, drawn(1, 4, 64, seed=2)], 1))
    ours, cache = reusing(model, x, TEXT, longer)
    assert cache.get_seq_length() == N
    assert torch.allclose(ours, hidden[:, TEXT], atol=1e-5)
    _, short = whole(model, x[:, :9])
    with pytest.raises(AttachError, match="holds 9 rows, the prompt has 20"):
        reusing(model, x, TEXT, short)
