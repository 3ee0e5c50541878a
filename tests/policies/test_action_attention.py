"""What actions look at, against the maps of eager attention in the same pruned run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from policies.action_attention import ActionAttention
from policies.hooks import ReductionHooks
from stream.data import Budget, PatchGrid, VisualTokens
from stream.memory import Memory
from stream.plan import Plan
from stream.reducers.base import Reducer, Site
from stream.signals import Signals
from tests.policies.test_query_rows import decoder, drawn, span

KEPT = [1, 4, 5, 10]
"""Of the 12 visual tokens of each sequence, which stand at places 1 to 12 of 20."""


class Fixed(Reducer):
    """Needs no signal, so that it also runs on eager attention."""

    @property
    def site(self) -> Site:
        return Site(2)

    def plan(self, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory) -> Plan:
        return Plan.keep(torch.tensor(KEPT), tokens.n)


def on_grid(maps: Tensor, layer: int) -> Tensor:
    """Rows [r, m] of a map -> their mean on the 12 places; layers from 2 on hold only KEPT."""
    out = torch.zeros(12)
    if layer < 2:
        return maps.mean(0)[1:13]
    out[KEPT] = maps.mean(0)[1 : 1 + len(KEPT)]
    return out


def forwards(model: Any, x: Tensor, sizes: list[int], **how: Any) -> list[Any]:
    """A prefill, then one forward for each part behind it, on one cache."""
    how |= {"past_key_values": DynamicCache(config=model.config), "use_cache": True}
    with torch.no_grad():
        return [model(inputs_embeds=part, **how) for part in x.split(sizes, dim=1)]


@pytest.mark.parametrize("layers", [range(3, 6), range(1, 4)])
@pytest.mark.parametrize(
    ("sizes", "rows", "counted"),
    [
        ([20, 1, 1], slice(-1, None), [[-1], [0], [0]]),  # one action token after the other
        ([20, 5], slice(-4, None), None),  # a state, then four slots at once
    ],
)
def test_mean_equals_eager_maps_of_the_same_run(
    layers: range, sizes: list[int], rows: slice, counted: list[list[int]] | None
) -> None:
    x = drawn(2, sum(sizes), 64)
    truth = decoder("llama", eager=True)
    hooks = ReductionHooks(truth, truth.layers, (Fixed(),), "keep")
    with hooks:
        hooks.expect([[span(1)], [span(1)]], text_from=13)
        outs = forwards(truth, x, sizes, output_attentions=True)
    if counted is None:
        outs, counted = outs[1:], [[-4, -3, -2, -1]]
    expected = [
        torch.stack(
            [
                on_grid(out.attentions[layer][i].mean(0)[at], layer)
                for out, at in zip(outs, counted, strict=True)
                for layer in layers
            ]
        ).mean(0)
        for i in range(2)
    ]

    model = decoder("llama")
    hooks = ReductionHooks(model, model.layers, (Fixed(),), "keep")
    with hooks:
        hooks.expect([[span(1)], [span(1)]], text_from=13)
        if len(counted) == len(sizes):
            with ActionAttention(hooks, layers, rows) as looked:
                forwards(model, x, sizes)
        else:
            held = DynamicCache(config=model.config)
            with torch.no_grad():
                model(inputs_embeds=x[:, :20], past_key_values=held, use_cache=True)
                with ActionAttention(hooks, layers, rows) as looked:
                    model(inputs_embeds=x[:, 20:], past_key_values=held, use_cache=True)
        got = looked.mean()
    assert [len(row) for row in got] == [1, 1]
    for i in range(2):
        assert torch.allclose(got[i][0], expected[i], atol=1e-6)
        assert not torch.allclose(got[i][0], expected[1 - i], atol=1e-4)
    assert model.config._attn_implementation == "sdpa"


def test_cameras_have_their_own_and_nothing_is_seen_outside_of_the_block() -> None:
    x, model = drawn(1, 20, 64), decoder("llama")
    first, wrist = span(1, PatchGrid(1, 2, 3)), span(7, PatchGrid(1, 2, 3))
    whole = ReductionHooks(model, model.layers, (), "keep")
    with torch.no_grad(), whole:
        whole.expect([[first, wrist]], text_from=13)
        with ActionAttention(whole, range(3, 6), slice(-1, None)) as looked:
            model(inputs_embeds=x, use_cache=False)
        ((a, b),) = looked.mean()
        model(inputs_embeds=2 * x, use_cache=False)
        assert [t.numel() for t in (a, b)] == [6, 6]
        with torch.no_grad():
            maps = decoder("llama", eager=True)(inputs_embeds=x, output_attentions=True).attentions
    mean = torch.stack([m[0, :, -1].mean(0) for m in maps[3:6]]).mean(0)
    assert torch.allclose(torch.cat([a, b]), mean[1:13], atol=1e-6)
