"""Prefills with stages between graphs: plans, caches and memories are those of the hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from policies.graphs.buckets import Section, sections
from policies.graphs.capture import GraphPool
from policies.graphs.staged import Prefilled, StagedDecoder
from policies.hooks import ReductionHooks
from policies.prefill import Prefill, VideoSpan
from stream.data import Budget
from stream.errors import AttachError
from stream.memory import Memory
from stream.plan import Plan
from stream.reducers.base import Reducer
from stream.reducers.vla_pruner import VLAPruner, remember
from stream.registry import build_reducer
from stream.signals import Signals

from .test_decoder import ANCHOR, BEFORE, GRID, KEPT, LENGTH, parts

PADDED, WIDTH, DEPTH = LENGTH + 5, 64, 6
STAGES: list[tuple[Reducer, ...]] = [
    (),
    (build_reducer("uniform"),),
    (build_reducer("fastv"),),
    (build_reducer("fastv"), build_reducer("inner_merge")),
    (VLAPruner(layer=1),),
    (VLAPruner(layer=2, semantic="last"),),
    (VLAPruner(layer=2, semantic="prefill"),),
    (VLAPruner(layer=2, mode="paper"),),
]


def spans(memories: list[Memory], time_s: float) -> list[list[VideoSpan]]:
    slots, whole = torch.arange(BEFORE, BEFORE + GRID.size), Plan.identity(GRID.size)
    given = (slots, GRID, (time_s,) * GRID.frames, Budget(KEPT), whole, Signals({}))
    return [[VideoSpan(*given, memory)] for memory in memories]


def decoder(text_model: Any, head: Any, stages: tuple[Reducer, ...], batch: int) -> StagedDecoder:
    inside = [stage for stage in stages if stage.site.in_llm]
    found = tuple(Section(s.first, s.stop) for s in sections(inside, DEPTH))
    pool, widths = GraphPool("cpu"), [WIDTH] * len(found)
    return StagedDecoder(text_model, head, found, widths, pool, batch=batch, watch=(DEPTH - 1,))


def prefilled(
    one: StagedDecoder, stages: tuple[Reducer, ...], rows: list[list[VideoSpan]], x: torch.Tensor
) -> tuple[Prefilled, Prefill]:
    padded = F.pad(x, (0, 0, 0, PADDED - LENGTH), value=3.0)
    position = torch.arange(PADDED).expand(len(rows), -1)
    return one.prefill(stages, rows, padded, position, LENGTH, BEFORE + GRID.size)


@pytest.mark.parametrize("stages", STAGES)
@torch.inference_mode()
def test_several_steps_are_those_of_the_hooks(stages: tuple[Reducer, ...]) -> None:
    text_model, head = parts("llama")
    one = decoder(text_model, head, stages, 2)
    hooks = ReductionHooks(text_model, text_model.layers, stages, "keep")
    ours, theirs = [Memory(0), Memory(1)], [Memory(0), Memory(1)]
    for step in range(5):
        x, cache = torch.randn(2, LENGTH, 64) * 0.5, DynamicCache()
        made, state = prefilled(one, stages, spans(ours, 0.1 * step), x)
        with hooks:
            hooks.expect(spans(theirs, 0.1 * step), BEFORE + GRID.size)
            text_model(inputs_embeds=x, past_key_values=cache, use_cache=True)
        assert list(made.lengths) == hooks.lengths()
        assert made.position.tolist() == [[LENGTH], [LENGTH]]
        layers: list[Any] = cache.layers
        for i, n in enumerate(made.lengths):
            assert torch.allclose(one.cache.keys[i][:, :, :n], layers[i].keys, atol=1e-5)
            assert torch.allclose(one.cache.values[i][:, :, :n], layers[i].values, atol=1e-5)
        for layer in range(DEPTH):
            pairs = zip(state.rows_at(layer), hooks.rows_at(layer), strict=True)
            for (mine,), (other,) in pairs:
                assert torch.equal(mine.slots, other.slots)
                assert mine.plan.same_as(other.plan)
        for memories in (ours, theirs):
            for memory in memories:
                seen = torch.rand(GRID.size, generator=memory.generator())
                remember(memory, seen, ANCHOR, GRID, time_s=0.1 * step, epoch=0)
                memory.tick += 1


@torch.inference_mode()
def test_a_prefix_moves_out_where_another_comes_while_it_is_held() -> None:
    text_model, head = parts("llama")
    stages = (build_reducer("fastv"),)
    one = decoder(text_model, head, stages, 1)
    x, behind, widths = torch.randn(3, 1, LENGTH, 64), torch.randn(1, 4, 64), (WIDTH, WIDTH)

    def said(made: Prefilled) -> torch.Tensor:
        one.resume(made)
        return one.extend(widths, behind, torch.tensor([4])).clone()

    alone, looked = [], []
    for each in x:
        made, _ = prefilled(one, stages, spans([Memory()], 0.0), each)
        assert made.outside is None
        alone.append(said(made))
        assert torch.equal(said(made), alone[-1])
        looked.append(one.looked.clone())
        assert float(looked[-1].sum()) == pytest.approx(1.0)
    held = []
    for each, expected in zip(x, alone, strict=True):
        held.append(prefilled(one, stages, spans([Memory()], 0.0), each)[0])
        assert torch.equal(said(held[-1]), expected)
    assert [made.outside is None for made in held] == [False, False, True]
    for i in (0, 2, 2, 1, 0):
        assert torch.equal(said(held[i]), alone[i])
        assert torch.equal(one.looked, looked[i])
    assert held[1].outside is not None
    cache, layers = DynamicCache(), [x for kept in held[1].outside for x in kept.unbind(1)]
    for i, (keys, values) in enumerate(layers):
        cache.update(keys, values, i)
    one.adopt(cache, held[1].position)
    assert torch.equal(one.extend(widths, behind, torch.tensor([4])), alone[1])
    assert torch.equal(said(held[2]), alone[2])


@torch.inference_mode()
def test_sections_are_built_once_for_each_length() -> None:
    text_model, head = parts("llama")
    stages = (build_reducer("fastv"),)
    one = decoder(text_model, head, stages, 1)
    for _ in range(3):
        prefilled(one, stages, spans([Memory()], 0.0), torch.randn(1, LENGTH, 64))
    assert len(one.programs) == 2


def test_a_stage_inside_a_section_is_refused() -> None:
    text_model, head = parts("llama")
    one = decoder(text_model, head, (build_reducer("fastv"),), 1)
    rows, x = spans([Memory()], 0.0), torch.randn(1, LENGTH, 64)
    with pytest.raises(AttachError, match=r"act at the layers \[4\]"):
        prefilled(one, (VLAPruner(layer=4),), rows, x)
