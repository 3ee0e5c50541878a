"""`attach` on a user's own model: what it refuses, what it leaves behind, what it tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from policies import hooks, probes
from policies.attach import attach
from stream.data import Budget, VisualTokens
from stream.errors import (
    AttachError,
    BudgetError,
    ConfigError,
    FoveateError,
    SignalError,
    UnknownNameError,
)
from stream.memory import Memory
from stream.plan import Plan
from stream.reducers.base import Reducer, Site
from stream.reducers.fastv import FastV
from stream.reducers.saliency import Saliency
from stream.signals import Signals
from tests.policies.oracle import FAMILIES, apart, build, generate, inputs_of

SHORT = {"max_new_tokens": 2, "min_new_tokens": 2}


def traces(model: Any) -> dict[str, Any]:
    """Everything that attaching touches; transformers leaves hooks of its own."""
    configs = (model.config, model.config.text_config, model.config.vision_config)
    modules = list(model.modules())
    held = [
        h for m in modules for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    ]
    return {
        "attention": [config._attn_implementation for config in configs],
        "hooks": sum(hook.__module__.startswith("policies") for hook in held),
        "probes": len(probes._requests),
        "attached": len(hooks._attached),
        "forwards": sum("forward" in vars(m) for m in modules),
    }


class Everything(Reducer):
    """Two stages at one layer."""

    @property
    def stages(self) -> tuple[Reducer, ...]:
        return FastV(layer=3), FastV(layer=3)

    def plan(self, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory) -> Plan:
        return Plan.identity(tokens.n)


class ByLength(Reducer):
    """Keeps one token more at every second call, so that sequences of a batch differ."""

    calls: ClassVar[list[int]] = []

    def plan(self, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory) -> Plan:
        self.calls.append(tokens.n)
        return Plan.keep(torch.arange(4 + len(self.calls) % 2), tokens.n)


class Fails(Saliency):
    def plan(self, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory) -> Plan:
        raise SignalError("broken on purpose")


# ---------------------------------------------------------------- leaving no trace


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["holitom", "fastv", "saliency", "uniform"])
def test_detaching_restores_the_model(family: str, name: str) -> None:
    model, inputs = build(family), inputs_of(family)
    before, clean = traces(model), generate(model, inputs)
    with attach(model, name, retain=0.3):
        assert traces(model) != before
        pruned = generate(model, inputs)
    assert traces(model) == before
    after = generate(model, inputs)
    assert apart(clean, pruned) > 1e-4
    assert apart(clean, after) == 0.0


def test_detach_may_be_called_by_hand_and_twice() -> None:
    model = build("llava_onevision")
    before = traces(model)
    held = attach(model, "holitom", retain=0.3)
    assert traces(model) == before  # nothing happens before the block
    held.__enter__()
    held.detach()
    assert traces(model) == before
    held.detach()
    with held:  # and used again
        generate(model, inputs_of("llava_onevision"), **SHORT)
        assert held.lengths[0] < 46
    assert traces(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exception_inside_the_block_restores_too(family: str) -> None:
    model = build(family)
    before = traces(model)
    with pytest.raises(ZeroDivisionError), attach(model, "holitom", retain=0.3):
        raise ZeroDivisionError
    assert traces(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_inside_the_model_leaves_nothing_for_the_next_prompt(family: str) -> None:
    model, inputs = build(family), inputs_of(family)
    before, clean = traces(model), generate(model, inputs, **SHORT)
    with attach(model, Fails(), retain=0.3):
        with pytest.raises(SignalError, match="broken on purpose"):
            generate(model, inputs, **SHORT)
        text = {"input_ids": torch.tensor([[11, 12, 13]])}
        inside = generate(model, text, **SHORT)
    assert traces(model) == before
    assert apart(inside, generate(model, text, **SHORT)) == 0.0
    assert apart(clean, generate(model, inputs, **SHORT)) == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vision_failure_leaves_no_expectation(family: str) -> None:
    """The video was announced but never arrived; the next prompt has none."""
    model, inputs = build(family), inputs_of(family)
    text = {"input_ids": torch.tensor([[11, 12, 13]])}
    clean = generate(model, text, **SHORT)
    broken = inputs | {"pixel_values_videos": inputs["pixel_values_videos"][..., :-1]}
    with attach(model, "uniform", retain=0.3):
        with pytest.raises((RuntimeError, ValueError)):
            generate(model, broken, **SHORT)
        assert apart(clean, generate(model, text, **SHORT)) == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_without_video_pass_untouched(family: str) -> None:
    model = build(family)
    text = {"input_ids": torch.tensor([[11, 12, 13, 14]])}
    clean = generate(model, text)
    with attach(model, "holitom", retain=0.3) as held:
        generate(model, inputs_of(family), **SHORT)
        assert apart(clean, generate(model, text)) == 0.0
        assert held.plans == []
        assert held.lengths == []


def test_a_generated_placeholder_is_no_new_video() -> None:
    """Qwen's grid stays among the arguments while decoding."""
    model, inputs = build("qwen2_5_vl"), inputs_of("qwen2_5_vl")
    with attach(model, "saliency", retain=0.3), torch.no_grad():
        first = generate(model, inputs, **SHORT)
        cache, told = first.past_key_values, first.sequences.shape[1]
        step = {
            "input_ids": inputs["input_ids"][:, 20:21],
            "attention_mask": torch.ones(1, told, dtype=torch.long),
            "position_ids": torch.full((4, 1, 1), told),
            "video_grid_thw": inputs["video_grid_thw"],
        }
        out = model(**step, past_key_values=cache)
    assert out.logits.shape[1] == 1


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({}, BudgetError, "retain is None and budget is None; give exactly one"),
        ({"retain": 0.5, "budget": 4}, BudgetError, "give exactly one of them"),
        ({"retain": 0.0}, BudgetError, r"retain ratio is 0.0; it must be in \(0, 1\]"),
        ({"retain": 1.5}, BudgetError, r"retain ratio is 1.5; it must be in \(0, 1\]"),
        ({"retain": float("nan")}, BudgetError, "retain ratio is nan"),
        ({"budget": -1}, BudgetError, "tokens is -1; it must be 0 or more"),
        ({"budget": 0}, BudgetError, "at least 1 must reach it"),
        (
            {"retain": 0.5, "positions": "shift"},
            ConfigError,
            "positions is 'shift'; allowed: keep, renumber",
        ),
        ({"retain": 0.5, "tua": 0.5}, ConfigError, "tua: .*Settings: tau"),
    ],
)
def test_wrong_arguments_are_refused_and_leave_nothing(
    wrong: dict[str, Any], error: type[FoveateError], message: str
) -> None:
    model = build("llava_onevision")
    before = traces(model)
    with pytest.raises(error, match=message), attach(model, "holitom", **wrong):
        generate(model, inputs_of("llava_onevision"), **SHORT)
    assert traces(model) == before


def test_wrong_reducers_are_refused() -> None:
    model = build("llava_onevision")
    with pytest.raises(UnknownNameError, match="Did you mean 'holitom'"):
        attach(model, "holytom", retain=0.5)
    with pytest.raises(ConfigError, match=r"FastV is built already, so \['layer'\] cannot be set"):
        attach(model, FastV(), retain=0.5, layer=3)
    with pytest.raises(ConfigError, match=r"acts at layer 6, the model has layers 0\.\.5"):
        attach(model, "fastv", retain=0.5, layer=6)
    with pytest.raises(AttachError, match="Two stages act at one layer of a model with 6 layers"):
        attach(model, Everything(), retain=0.5)


def test_a_signal_the_model_cannot_give_names_the_reducers_that_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("llava_onevision")
    monkeypatch.setattr("policies.video.llava_onevision.Adapter.provides", frozenset())
    with pytest.raises(
        AttachError, match="cannot give saliency before the language model"
    ) as caught:
        attach(model, "saliency", retain=0.5)
    fitting = str(caught.value).split("reducers that fit: ")[1]
    assert "fastv" in fitting
    assert "uniform" in fitting
    assert "holitom" not in fitting


def test_signals_are_given_where_they_arise() -> None:
    """Rows of the language model are known inside it, the encoder's saliency before it."""
    model = build("llava_onevision")

    class TooDeep(Saliency):
        @property
        def site(self) -> Site:
            return Site(2)

    with pytest.raises(AttachError, match="text_rows before the language model, which VLAPr"):
        attach(model, "vla_pruner", retain=0.5, layer=None)
    with pytest.raises(AttachError, match="saliency inside the language model, which TooDeep"):
        attach(model, TooDeep(), retain=0.5)
    with pytest.raises(AttachError, match="cannot give keys and values of the tick before"):
        attach(model, "vla_cache", retain=0.5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["fastv", "saliency", "holitom"])
def test_eager_attention_is_refused_with_advice(family: str, name: str) -> None:
    model = build(family, eager=True)
    before = traces(model)
    with (
        pytest.raises(AttachError, match="runs 'eager' attention; load it with attn_implementa"),
        attach(model, name, retain=0.3),
    ):
        pass
    assert traces(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_attention_is_fine_where_nothing_is_probed(family: str) -> None:
    inputs = inputs_of(family)
    runs = []
    for eager in (False, True):
        model = build(family, eager=eager)
        with attach(model, "uniform", retain=0.3):
            runs.append(generate(model, inputs))
    assert apart(*runs) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_training_mode_is_refused(family: str) -> None:
    model = build(family).train()
    with (
        attach(model, "uniform", retain=0.3),
        pytest.raises(AttachError, match=r"training mode; call model\.eval\(\)"),
    ):
        model(**inputs_of(family))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["fastv", "saliency", "holitom"])
def test_a_static_cache_is_refused(family: str, name: str) -> None:
    model = build(family)
    with (
        attach(model, name, retain=0.3),
        pytest.raises(AttachError, match="generate with the default dynamic cache"),
    ):
        generate(model, inputs_of(family), cache_implementation="static")


@pytest.mark.parametrize("first", ["fastv", "uniform"])
@pytest.mark.parametrize("second", ["fastv", "saliency", "random_keep"])
def test_a_second_reducer_is_refused_and_the_first_stays(first: str, second: str) -> None:
    model, inputs = build("llava_onevision"), inputs_of("llava_onevision")
    before = traces(model)
    with attach(model, first, retain=0.3) as held:
        alone, mine = generate(model, inputs), traces(model)
        with (
            pytest.raises(AttachError, match="is pruned already; detach the first reducer"),
            attach(model, second, retain=0.3),
        ):
            pass
        with pytest.raises(AttachError, match="is pruned already"), held:
            pass
        assert traces(model) == mine
        assert apart(alone, generate(model, inputs)) == 0.0
    assert traces(model) == before


def test_two_models_may_be_attached_at_once() -> None:
    llava, qwen = build("llava_onevision"), build("qwen2_5_vl")
    runs = []
    for together in (False, True):
        with attach(llava, "fastv", retain=0.3):
            if together:
                with attach(qwen, "holitom", retain=0.3):
                    generate(qwen, inputs_of("qwen2_5_vl"), **SHORT)
                    runs.append(generate(llava, inputs_of("llava_onevision")))
            else:
                runs.append(generate(llava, inputs_of("llava_onevision")))
    assert apart(*runs) == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cropped_cache_is_refused(family: str) -> None:
    """As assisted decoding would leave it: all layers cut to one length."""
    model, inputs = build(family), inputs_of(family)
    with attach(model, "fastv", retain=0.3), torch.no_grad():
        out = model(**inputs, use_cache=True)
        tokens = torch.tensor([[11, 12, 13]])
        out = model(input_ids=tokens, past_key_values=out.past_key_values, use_cache=True)
        out.past_key_values.crop(out.past_key_values.get_seq_length() - 2)
        with pytest.raises(AttachError, match="cache was cropped, as assisted decoding does"):
            model(input_ids=tokens[:, :1], past_key_values=out.past_key_values, use_cache=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_part_of_a_prompt_is_refused(family: str) -> None:
    model, inputs = build(family), inputs_of(family)
    keys = [k for k in inputs if k in ("input_ids", "attention_mask", "mm_token_type_ids")]
    part = inputs | {key: inputs[key][:, :20] for key in keys}
    with (
        attach(model, "uniform", retain=0.3),
        pytest.raises(AttachError, match=r"holds \d+ placeholders for a video of \d+ tokens"),
    ):
        model(**part)


def test_sequences_that_shrink_differently_are_refused() -> None:
    model = build("llava_onevision")
    with (
        attach(model, ByLength(), retain=0.3),
        pytest.raises(AttachError, match=r"shrink to different lengths \(\[14, 15\]\)"),
    ):
        generate(model, inputs_of("llava_onevision", batch=2))


# ---------------------------------------------------------------- what it tells


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"retain": 0.25}, lambda n: round(n / 4)),
        ({"retain": 0.001}, lambda n: 1),
        ({"budget": 7}, lambda n: 7),
        ({"budget": 10_000}, lambda n: n),
    ],
)
def test_plans_and_lengths_say_what_was_kept(
    family: str, settings: dict[str, Any], kept: Callable[[int], int]
) -> None:
    model, inputs = build(family), inputs_of(family)
    n = 36 if family == "llava_onevision" else 48
    with attach(model, "saliency", **settings) as held:
        assert held.plans == []
        generate(model, inputs, **SHORT)
        ((plan,),) = held.plans
        assert (plan.n, plan.k) == (n, kept(n))
        assert held.lengths == [inputs["input_ids"].shape[1] - n + plan.k] * 6
    assert held.plans[0][0] is plan  # still there after the block


def test_holitom_halves_inside_the_model() -> None:
    model, inputs = build("llava_onevision"), inputs_of("llava_onevision")
    paper = {"layer": 18 / 28, "drop": 0.5}
    with attach(model, "holitom", budget=12, inner=paper) as held:
        generate(model, inputs, **SHORT)
        ((plan,),) = held.plans
        assert (plan.n, plan.k) == (36, 6)
        assert held.lengths == [22] * 4 + [16] * 2  # 18 of 28 is 4 of 6


def test_zero_tokens_inside_the_model_are_legal() -> None:
    model, inputs = build("llava_onevision"), inputs_of("llava_onevision")
    with attach(model, "fastv", budget=0) as held:
        out = generate(model, inputs)
        assert held.lengths == [46] * 2 + [10] * 4
    assert bool(torch.isfinite(out.logits[-1]).all())


def test_seeds_reach_random_reducers() -> None:
    model, inputs = build("llava_onevision"), inputs_of("llava_onevision")

    def anchors(seed: int) -> list[int]:
        with attach(model, "random_keep", budget=9, seed=seed) as held:
            generate(model, inputs, **SHORT)
            return held.plans[0][0].anchor.tolist()

    assert anchors(1) == anchors(1)
    assert anchors(1) != anchors(2)


def test_a_users_own_reducer_can_be_attached() -> None:
    """A class outside of the registry, inside the model, that reads states."""

    class Loudest(Reducer):
        @property
        def site(self) -> Site:
            return Site(1)

        def plan(
            self, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory
        ) -> Plan:
            loud: Tensor = tokens.x.norm(dim=-1)
            return Plan.keep(loud.topk(budget.tokens).indices.sort().values, tokens.n)

    model, inputs = build("llava_onevision"), inputs_of("llava_onevision")
    with attach(model, Loudest(), budget=5) as held:
        generate(model, inputs, **SHORT)
        assert held.lengths == [46, *[15] * 5]


def test_saliency_that_nobody_reads_does_not_pile_up() -> None:
    """With room for all tokens no stage asks for it."""
    model, inputs = build("qwen2_5_vl"), inputs_of("qwen2_5_vl")
    with attach(model, "saliency", retain=1.0) as held:
        sizes = []
        for _ in range(3):
            generate(model, inputs, **SHORT)
            sizes.append(len(held._tap._parts))
    assert sizes == [sizes[0]] * 3
    assert sizes[0] > 0
