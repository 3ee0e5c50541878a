"""Pruned runs against the untouched model, the mask oracle and loops over layers."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from policies.adapter import VideoAdapter
from policies.attach import attach
from policies.prefill import lift
from policies.query_rows import ROW_SIGNALS
from stream.errors import AttachError
from stream.plan import Plan
from stream.reducers.base import Reducer
from stream.reducers.fastv import FastV
from stream.reducers.inner_merge import InnerMerge
from stream.reducers.saliency import Saliency
from stream.reducers.vla_pruner import VLAPruner
from stream.registry import build_reducer, reducer_names
from tests.policies.oracle import (
    FAMILIES,
    NEW,
    Oracle,
    apart,
    build,
    cache_lengths,
    generate,
    inputs_of,
    read_off,
    stages_of,
    video_slots,
    watching,
)

DEPTH = 6
FITTING = [n for n in reducer_names() if VideoAdapter.fits(build_reducer(n))]
KEEP_ALL: dict[str, dict[str, Any]] = {
    "holitom": {"inner": InnerMerge(drop=0.0)},
    "inner_merge": {"drop": 0.0},
}


class Chain(Saliency):
    """Three stages that all shrink: before the model and twice inside it."""

    @property
    def stages(self) -> tuple[Reducer, ...]:
        return self, InnerMerge(layer=2, drop=0.3), InnerMerge(layer=4)


def reducer_of(name: str, settings: dict[str, Any]) -> Reducer:
    if name in ("prefill", "text"):
        return VLAPruner(semantic=name)
    return Chain() if name == "chain" else build_reducer(name, **settings)


DROPS: list[tuple[str, dict[str, Any]]] = [
    ("chain", {}),
    ("fastv", {"layer": 1}),
    ("fastv", {"layer": 2}),
    ("fastv", {"layer": 5}),
    ("inner_merge", {"layer": 3}),
    ("saliency", {}),
    ("uniform", {}),
    ("uniform_frames", {}),
    ("random_keep", {}),
    ("vla_pruner", {}),
    ("vla_pruner", {"semantic": "prefill", "layer": 2}),
    ("vla_pruner", {"semantic": "last", "layer": 0.5}),
    ("holitom", {"inner": None, "tau": 0.0}),
    ("holitom", {"tau": 0.0}),
    ("holitom", {"contextual": 0.5, "tau": 0.0}),
]


@cache
def model(family: str) -> Any:
    return build(family)


@cache
def eager(family: str) -> Any:
    return build(family, eager=True)


@cache
def untouched(family: str) -> Any:
    return generate(build(family), inputs_of(family))


def oracle_run(family: str, inputs: dict[str, Tensor], oracle: Oracle) -> Any:
    with oracle.attached():
        return generate(eager(family), inputs)


# ---------------------------------------------------------------- keeping everything


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FITTING)
def test_keeping_all_is_bit_equal(family: str, name: str) -> None:
    inputs = inputs_of(family)
    reducer = build_reducer(name, **KEEP_ALL.get(name, {}))
    with torch.no_grad():
        plain = build(family)(**inputs).logits
    for positions in ("keep", "renumber"):
        with attach(model(family), reducer, retain=1.0, positions=positions) as held:
            out = generate(model(family), inputs)
            with torch.no_grad():
                forward = model(family)(**inputs).logits
            (plan,) = held.plans[0]
            assert plan.same_as(Plan.identity(plan.n))
            assert held.lengths == [inputs["input_ids"].shape[1]] * DEPTH
        assert torch.equal(out.sequences, untouched(family).sequences)
        for ours, theirs in zip(out.logits, untouched(family).logits, strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(forward, plain)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["holitom", "fastv"])
def test_bfloat16_keeps_its_dtype_and_is_bit_equal_too(family: str, name: str) -> None:
    half = build(family).bfloat16()
    inputs = inputs_of(family)
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].bfloat16()
    plain = generate(half, inputs)
    with attach(half, build_reducer(name, **KEEP_ALL.get(name, {})), retain=1.0):
        whole = generate(half, inputs)
    with attach(half, name, retain=0.3) as held:
        pruned = generate(half, inputs)
        (plan,) = held.plans[0]
    assert apart(plain, whole) == 0.0
    assert plan.k < plan.n
    assert cache_lengths(pruned)[-1] < cache_lengths(plain)[-1]
    assert {layer.keys.dtype for layer in pruned.past_key_values.layers} == {torch.bfloat16}
    assert bool(torch.isfinite(torch.cat(pruned.logits)).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_itself_equals_the_untouched_model(family: str) -> None:
    """Otherwise agreement with it would mean little."""
    out = oracle_run(family, inputs_of(family), Oracle(eager(family).model.language_model.layers))
    assert torch.equal(out.sequences, untouched(family).sequences)
    assert apart(out, untouched(family)) < 1e-5


# ---------------------------------------------------------------- dropping and merging


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "settings"), DROPS)
def test_a_shorter_sequence_equals_the_mask_oracle(
    family: str, name: str, settings: dict[str, Any]
) -> None:
    inputs = inputs_of(family)
    slots, length = video_slots(inputs, family), inputs["input_ids"].shape[1]
    reducer = reducer_of(name, settings)
    with watching() as seen, attach(model(family), reducer, retain=0.3) as held:
        out = generate(model(family), inputs)
        lengths, (plan,) = held.lengths, held.plans[0]
    assert len(seen) == len(reducer.stages)

    oracle = Oracle(eager(family).model.language_model.layers, stages_of(seen, slots, DEPTH))
    truth = oracle_run(family, inputs, oracle)
    assert torch.equal(out.sequences, truth.sequences)
    assert apart(out, truth) < 1e-5
    assert apart(out, untouched(family)) > 1e-3  # something was dropped

    expected, gone, composed = [], 0, Plan.identity(slots.numel())
    stages = {
        one.reducer.site.layer_index(DEPTH) if one.reducer.site.in_llm else 0: one for one in seen
    }
    for layer in range(DEPTH):
        if layer in stages:
            gone += stages[layer].plan.n - stages[layer].plan.k
            composed = stages[layer].plan @ composed
        expected.append(length - gone)
    assert lengths == expected
    assert cache_lengths(out) == [n + NEW - 1 for n in expected]
    assert min(lengths) < length
    assert plan.same_as(composed)

    for one in seen:
        at = slots[one.tokens.index]
        for signal in one.reducer.needs & ROW_SIGNALS:
            layer = one.reducer.site.layer_index(DEPTH)
            alive = torch.cat([torch.arange(length)[~torch.isin(torch.arange(length), slots)], at])
            row = read_off(signal, oracle.maps[layer - 1], alive.sort().values, at)
            assert torch.allclose(one.signals[signal], row, atol=1e-6)
            assert float(row.std()) > 1e-4
            if isinstance(one.reducer, FastV | InnerMerge):
                assert torch.equal(row.topk(one.plan.k).indices.sort().values, one.plan.anchor)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "name", ["divprune", "fastv", "holitom", "inner_merge", "pyramiddrop", "tome", "vla_pruner"]
)
def test_plain_forward_with_gradients_equals_generate(family: str, name: str) -> None:
    """Outside of `no_grad` too, and gradients flow through what was kept."""
    inputs = inputs_of(family)
    with attach(model(family), name, retain=0.3):
        logits = model(family)(**inputs).logits
        out = generate(model(family), inputs)
    assert torch.allclose(logits[:, -1].detach(), out.logits[0], atol=1e-5)
    assert logits.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_the_inner_merge_equals_a_hand_loop_inside_the_model(family: str) -> None:
    """Kept by the eager row of the layer before; the rest folded one by one into hidden states."""
    inputs, layer = inputs_of(family), 3
    slots = video_slots(inputs, family)
    layers = eager(family).model.language_model.layers

    def by_hand(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        score = oracle.maps[layer - 1][-1, slots]
        best = sorted(range(len(slots)), key=lambda i: -float(score[i]))
        kept = sorted(best[: round(len(slots) / 2)])
        states = {i: hidden[slots[i]].clone() for i in kept}
        dropped = [i for i in range(len(slots)) if i not in kept]
        cosine = torch.nn.functional.cosine_similarity
        targets = [
            max(kept, key=lambda j: float(cosine(hidden[slots[i]], hidden[slots[j]], dim=0)))
            for i in dropped
        ]
        for i, j in zip(dropped, targets, strict=True):
            states[j] = (states[j] + hidden[slots[i]]) / 2
        return slots[kept], torch.stack(list(states.values())), slots[dropped]

    oracle = Oracle(layers, {layer: by_hand})
    truth = oracle_run(family, inputs, oracle)
    with attach(model(family), "inner_merge", layer=layer, retain=1.0):
        out = generate(model(family), inputs)
    assert torch.equal(out.sequences, truth.sequences)
    assert apart(out, truth) < 1e-5
    assert apart(out, untouched(family)) > 1e-3


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize("family", FAMILIES)
def test_renumbering_is_another_run_and_equals_a_short_prompt(family: str) -> None:
    """`renumber` is what the text model does with the shortened embeddings alone."""
    inputs = inputs_of(family)
    slots = video_slots(inputs, family)
    text: dict[str, Tensor] = {}

    def catch(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        text.setdefault("inputs_embeds", kwargs["inputs_embeds"].clone())

    with watching() as seen, attach(model(family), "saliency", retain=0.3, positions="renumber"):
        hook = model(family).model.language_model.register_forward_pre_hook(catch, with_kwargs=True)
        out = generate(model(family), inputs)
        hook.remove()
    with attach(model(family), "saliency", retain=0.3, positions="keep"):
        kept = generate(model(family), inputs)
    short = text["inputs_embeds"]
    assert short.shape[1] == inputs["input_ids"].shape[1] - seen[0].plan.n + seen[0].plan.k
    alone = generate(build(family), {"inputs_embeds": short})
    assert apart(out, alone) < 1e-5
    assert apart(out, kept) > 1e-4

    layers = eager(family).model.language_model.layers
    truth = oracle_run(family, inputs, Oracle(layers, stages_of(seen, slots, DEPTH)))
    assert apart(kept, truth) < 1e-5
    assert apart(out, truth) > 1e-4


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("name", ["saliency", "fastv", "holitom"])
def test_rope_deltas_are_untouched(name: str, positions: Any) -> None:
    fresh = build("qwen2_5_vl")
    inputs = inputs_of("qwen2_5_vl")
    generate(fresh, inputs)
    expected = fresh.model.rope_deltas.clone()
    fresh.model.rope_deltas = None
    with attach(fresh, name, retain=0.3, positions=positions):
        generate(fresh, inputs)
        assert torch.equal(fresh.model.rope_deltas, expected)
    assert torch.equal(fresh.model.rope_deltas, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_published_order_reaches_the_model_as_published(family: str) -> None:
    """Rows in the order of the plan stand where the video stood."""
    inputs = inputs_of(family)
    slots = video_slots(inputs, family)
    text: dict[str, Tensor] = {}

    def catch(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        text.setdefault("inputs_embeds", kwargs["inputs_embeds"].clone())

    how = build_reducer("holitom", order="published", contextual=0.5, tau=0.0, inner=None)
    with watching() as seen, attach(model(family), how, retain=0.3, positions="renumber"):
        hook = model(family).model.language_model.register_forward_pre_hook(catch, with_kwargs=True)
        out = generate(model(family), inputs)
        hook.remove()
    (one,) = seen
    assert bool((one.plan.anchor.diff() < 0).any())
    start = int(slots[0])
    rows = text["inputs_embeds"][0, start : start + one.plan.k]
    assert torch.equal(rows, one.plan.apply(one.tokens.x))
    assert apart(out, generate(build(family), text)) < 1e-5


# ---------------------------------------------------------------- batches and padding


def padded(inputs: dict[str, Tensor], by: int) -> dict[str, Tensor]:
    """The same prompt behind `by` padding tokens on the left."""
    out = dict(inputs)
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if key in inputs:
            filler = inputs[key].new_zeros(inputs[key].shape[0], by)
            out[key] = torch.cat([filler, inputs[key]], 1)
    return out


def one_of(inputs: dict[str, Tensor], row: int, batch: int) -> dict[str, Tensor]:
    """Sequence `row` of a batch, with its part of the pixels."""
    return {key: value.chunk(batch)[row] for key, value in inputs.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "name", ["fastv", "inner_merge", "saliency", "holitom", "uniform", "chain", "prefill", "text"]
)
def test_left_padding_changes_nothing(family: str, name: str) -> None:
    inputs = inputs_of(family)
    with attach(model(family), reducer_of(name, {}), retain=0.3) as held:
        plain = generate(model(family), inputs)
        (plan,) = held.plans[0]
        behind = generate(model(family), padded(inputs, 3))
        (plan_behind,) = held.plans[0]
    assert apart(plain, behind) < 1e-5
    assert plan_behind.same_as(plan)
    assert torch.equal(plain.sequences, behind.sequences[:, 3:])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize(
    "name",
    ["fastv", "inner_merge", "saliency", "holitom", "random_keep", "chain", "prefill", "text"],
)
def test_a_batch_equals_single_runs(family: str, name: str, positions: Any) -> None:
    batch = inputs_of(family, batch=2)
    with attach(model(family), reducer_of(name, {}), retain=0.3, positions=positions) as held:
        both = generate(model(family), batch)
        plans = [row[0] for row in held.plans]
        for row in range(2):
            alone = generate(model(family), one_of(batch, row, 2))
            assert held.plans[0][0].same_as(plans[row])
            assert torch.equal(both.sequences[row], alone.sequences[0])
            for ours, theirs in zip(both.logits, alone.logits, strict=True):
                assert torch.allclose(ours[row], theirs[0], atol=1e-5)
    if name in ("fastv", "saliency"):
        assert not plans[0].same_as(plans[1])


@pytest.mark.parametrize("name", ["fastv", "saliency", "chain", "prefill", "text"])
@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_a_batch_of_prompts_of_different_length_equals_single_runs(
    name: str, positions: Any
) -> None:
    """The shorter prompt stands behind padding."""
    family = "llava_onevision"
    long, short = inputs_of(family, suffix=9), inputs_of(family, suffix=5)
    both = {key: torch.cat([long[key], padded(short, 4)[key]]) for key in long}
    with attach(model(family), reducer_of(name, {}), retain=0.3, positions=positions):
        together = generate(model(family), both)
        for row, alone in enumerate((long, short)):
            single = generate(model(family), alone)
            for ours, theirs in zip(together.logits, single.logits, strict=True):
                assert torch.allclose(ours[row], theirs[0], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["fastv", "saliency"])
def test_beams_equal_beams_over_the_oracle(family: str, name: str) -> None:
    """All beams share one prompt, so they share what is kept."""
    inputs = inputs_of(family)
    slots = video_slots(inputs, family)
    beams = {"num_beams": 2, "output_logits": False, "output_scores": True}
    with watching() as seen, attach(model(family), name, retain=0.3) as held:
        out = generate(model(family), inputs, **beams)
        first, second = (row[0] for row in held.plans)
    assert first.same_as(second)
    assert first.k < first.n
    layers = eager(family).model.language_model.layers
    with Oracle(layers, stages_of(seen[:1], slots, DEPTH)).attached():
        truth = generate(eager(family), inputs, **beams)
    assert torch.equal(out.sequences, truth.sequences)
    assert torch.allclose(out.sequences_scores, truth.sequences_scores, atol=1e-5)


# ---------------------------------------------------------------- several videos


def two_videos(family: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """(one prompt with two videos and text between them, the slots of each)."""
    batch = inputs_of(family, batch=2)
    out = dict(batch)
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if key in batch:
            out[key] = batch[key].view(1, -1)
    half = batch["input_ids"].shape[1]
    first, second = (video_slots(batch, family, row) for row in range(2))
    return out, [first, second + half]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["fastv", "saliency", "holitom", "vla_pruner"])
def test_two_videos_in_one_prompt_equal_the_oracle(family: str, name: str) -> None:
    inputs, slots = two_videos(family)
    reducer = build_reducer(name)
    with watching() as seen, attach(model(family), reducer, retain=0.3) as held:
        out = generate(model(family), inputs)
        plans = held.plans[0]
    stages = len(reducer.stages)
    assert len(plans) == 2
    assert len(seen) == 2 * stages
    separate = [stages_of(seen[video::2], slots[video], DEPTH) for video in range(2)]
    assert separate[0].keys() == separate[1].keys()

    def both(layer: int) -> Any:
        def change(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            parts = [one[layer](hidden) for one in separate]
            stay, rows, hide = (torch.cat(part) for part in zip(*parts, strict=True))
            return stay, rows, hide

        return change

    layers = eager(family).model.language_model.layers
    truth = oracle_run(family, inputs, Oracle(layers, {at: both(at) for at in separate[0]}))
    assert torch.equal(out.sequences, truth.sequences)
    assert apart(out, truth) < 1e-5
    for video in (0, 1):
        assert plans[video].n == slots[video].numel()


# ---------------------------------------------------------------- more text after a prefill


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["fastv", "inner_merge", "saliency", "holitom", "chain"])
def test_a_second_prompt_on_a_pruned_cache_equals_the_oracle(family: str, name: str) -> None:
    inputs = inputs_of(family)
    slots = video_slots(inputs, family)
    question = torch.tensor([[11, 12, 13, 14]])

    def both_turns(runner: Any) -> tuple[Any, Any]:
        first = generate(runner, inputs)
        told = first.sequences.shape[1]
        mask = torch.ones(1, told + question.shape[1], dtype=torch.long)
        new = torch.cat([first.sequences[:, -1:], question], 1)  # the last answer token is not fed
        second = {
            "input_ids": new,
            "attention_mask": mask,
            "past_key_values": first.past_key_values,
        }
        return first, generate(runner, second)

    with watching() as seen, attach(model(family), reducer_of(name, {}), retain=0.3):
        first, second = both_turns(model(family))
    layers = eager(family).model.language_model.layers
    with Oracle(layers, stages_of(seen, slots, DEPTH)).attached():
        true_first, true_second = both_turns(eager(family))
    assert apart(first, true_first) < 1e-5
    assert apart(second, true_second) < 1e-5
    assert torch.equal(second.sequences, true_second.sequences)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["fastv", "saliency", "holitom"])
def test_decoding_by_hand_equals_the_oracle(family: str, name: str) -> None:
    """A user's own loop over forward: no mask, no positions, only new tokens and the cache."""
    inputs = inputs_of(family)
    slots = video_slots(inputs, family)
    tokens = torch.tensor([[21, 22, 23, 24, 25, 26]])

    def steps(runner: Any) -> list[Tensor]:
        with torch.no_grad():
            out = runner(**inputs, use_cache=True)
            logits = [out.logits[:, -1]]
            for new in tokens.split([1, 1, 3, 1], dim=1):
                held = out.past_key_values
                out = runner(input_ids=new, past_key_values=held, use_cache=True)
                logits += out.logits.unbind(1)
        return logits

    with watching() as seen, attach(model(family), name, retain=0.3):
        ours = steps(model(family))
    layers = eager(family).model.language_model.layers
    with Oracle(layers, stages_of(seen, slots, DEPTH)).attached():
        truth = steps(eager(family))
    assert len(ours) == 7
    for mine, true in zip(ours, truth, strict=True):
        assert torch.allclose(mine, true, atol=1e-5)


@pytest.mark.parametrize("name", ["fastv", "saliency", "holitom"])
def test_conversations_may_take_turns(name: str) -> None:
    """Each cache remembers its own prefill, a copied one that of the last, text has none."""
    family = "llava_onevision"
    prompts = [
        inputs_of(family),
        inputs_of(family, frames=6),
        {"input_ids": torch.tensor([[9, 8]])},
    ]
    question = torch.tensor([[11, 12, 13]])

    def ask(first: Any, held: Any) -> Any:
        ids = torch.cat([first.sequences[:, -1:], question], 1)
        mask = torch.ones(1, first.sequences.shape[1] + 3, dtype=torch.long)
        more = {"input_ids": ids, "attention_mask": mask, "past_key_values": held}
        return generate(model(family), more)

    with attach(model(family), name, retain=0.3):
        alone = []
        for prompt in prompts:
            first = generate(model(family), prompt)
            copied = copy.deepcopy(first.past_key_values)
            alone.append(ask(first, first.past_key_values))
            assert apart(ask(first, copied), alone[-1]) < 1e-6
        firsts = [generate(model(family), prompt) for prompt in prompts]
        for first, expected in zip(firsts, alone, strict=True):
            assert apart(ask(first, first.past_key_values), expected) == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_conversation_again_on_a_pruned_cache_is_refused(family: str) -> None:
    """`generate` would guess from the first layer's short cache which tokens are new."""
    inputs = inputs_of(family)
    more = torch.tensor([[11, 12, 13]])

    def again(first: Any) -> Any:
        ids = torch.cat([first.sequences, more], 1)
        held = first.past_key_values
        told = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": held}
        return generate(model(family), told)

    with attach(model(family), "saliency", retain=0.3):
        first = generate(model(family), inputs)
        with pytest.raises(AttachError, match="on a pruned cache pass only new tokens"):
            again(first)
    with attach(model(family), "fastv", retain=0.3):  # its first layer is whole
        assert again(generate(model(family), inputs)).sequences.shape[1] > more.shape[1]


# ---------------------------------------------------------------- lifting plans


def test_lift_keeps_text_and_places() -> None:
    slots = torch.tensor([2, 3, 4, 5])
    halves = Plan.merge(
        torch.tensor([1, 2]), torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2]), torch.ones(3) / 2, 4
    )
    whole = lift([(slots, halves)], 8, torch.device("cpu"))
    assert whole.anchor.tolist() == [0, 1, 3, 4, 6, 7]
    x = torch.arange(8.0)[:, None]
    assert whole.apply(x)[:, 0].tolist() == [0, 1, 2.5, 2, 6, 7]
    swapped = lift([(slots, Plan.keep(torch.tensor([3, 0]), 4))], 8, torch.device("cpu"))
    assert swapped.anchor.tolist() == [0, 1, 5, 2, 6, 7]
    two = lift(
        [(slots[:2], Plan.keep(torch.tensor([1]), 2)), (slots[2:], Plan.keep(slots[:0], 2))],
        8,
        torch.device("cpu"),
    )
    assert two.anchor.tolist() == [0, 1, 3, 6, 7]
