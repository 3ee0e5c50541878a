"""Flow policies in the speed bench: both arms act alike, and fewer tokens are less work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from foveate.timing import flops, kinds, measure, shapes
from foveate.timing.flow import FlowSubject
from policies.graphs.capture import GraphPool
from stream.memory import Memory
from stream.registry import build_reducer

MODELS = ("tiny-smolvla", "tiny-pi0", "tiny-pi05")


def subject(name: str) -> FlowSubject:
    return shapes.flow_subject(name, 3, "cpu", torch.float32)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("reducer", ["vla_pruner", "divprune"])
@pytest.mark.parametrize("batch", [1, 2])
def test_fixed_shapes_act_as_the_growing_cache_does(model: str, reducer: str, batch: int) -> None:
    one, pool, method = subject(model), GraphPool("cpu"), build_reducer(reducer)
    for how, retain in ((None, 1.0), (method, 0.25)):
        pair = [
            kinds.eager_arm(one, how, retain, batch),
            kinds.fixed_arm(one, how, retain, batch, pool),
        ]
        run = measure.interleaved(pair, repeats=2, warmup=0, seed=0)
        assert run.answers[pair[1].key].shape == (batch, 5, 32)
        (row,) = measure.rows_of(pair[1:], run)
        assert row["agreement"]["relative_error"] < 1e-5
        assert row["ms"]["denoise"]["n"] == 2


@pytest.mark.parametrize("model", MODELS)
def test_all_tokens_kept_are_the_unpruned_actions_and_few_are_others(model: str) -> None:
    one, pool, method = subject(model), GraphPool("cpu"), build_reducer("vla_pruner")
    cases = ((None, 1.0), (method, 1.0), (method, 0.25))
    every = [kinds.fixed_arm(one, how, retain, 1, pool) for how, retain in cases]
    plain, kept, few = measure.interleaved(every, repeats=1, warmup=0, seed=0).answers.values()
    assert torch.equal(plain, kept)
    assert not torch.allclose(plain, few)


@pytest.mark.parametrize("model", MODELS)
def test_every_stage_behind_the_encoder_works_less_with_fewer_tokens(model: str) -> None:
    one, method = subject(model), build_reducer("vla_pruner")
    work = [
        flops.request_flops(kinds.eager_arm(one, method if r < 1 else None, r, 1))
        for r in (1.0, 0.5, 0.25, 0.125)
    ]
    for stage in ("prefill", "denoise"):
        counts = [w[stage] for w in work]
        assert counts == sorted(set(counts), reverse=True)
    assert len({w["encode"] for w in work}) == 1


def test_microseconds_a_token_are_the_slope_between_neighbouring_buckets() -> None:
    one, pool, method = subject("tiny-pi05"), GraphPool("cpu"), build_reducer("divprune")
    every = [kinds.fixed_arm(one, None, 1.0, 1, pool)]
    every += [kinds.fixed_arm(one, method, r, 1, pool) for r in (0.5, 0.25)]
    times_ms = dict(zip((arm.key for arm in every), (10.0, 7.0, 5.5), strict=True))
    samples: dict[str, Any] = {
        key: {what: [ms] for what in ("first", "total", "host")} for key, ms in times_ms.items()
    }
    rows = measure.rows_of(every, measure.Run(samples=samples))
    assert [row["kept"] for row in rows] == [192, 96, 48]
    assert "us_per_token" not in rows[0]
    assert [row["us_per_token"] for row in rows[1:]] == pytest.approx([31.25, 31.25])
    assert measure.slopes_us(rows) == pytest.approx({"graph": 31.25})


def test_a_step_remembers_what_two_earlier_ones_looked_at() -> None:
    one, pool, method = subject("tiny-pi05"), GraphPool("cpu"), build_reducer("vla_pruner")
    with_past = kinds.fixed_arm(one, method, 0.25, 1, pool)
    one_without = subject("tiny-pi05")
    one_without.memory = Memory  # type: ignore[method-assign]
    without = kinds.fixed_arm(one_without, method, 0.25, 1, pool)
    acted = [
        measure.interleaved([arm], repeats=1, warmup=0, seed=0).answers[arm.key]
        for arm in (with_past, without)
    ]
    assert len(one.memory().state["vla_pruner"].glances) == 2
    kept = [
        arm.decoder.anchor[0, : arm.layer_tokens[-1]].sort().values for arm in (with_past, without)
    ]
    assert not torch.equal(*kept)
    assert not torch.allclose(*acted)
