"""OpenVLA-shaped networks with weights of their own in the speed bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from foveate.cli import app
from foveate.settings import reducer_of
from foveate.timing import flops, kinds, measure, shapes
from foveate.timing.vla import INSTRUCTION, VLASubject
from policies.graphs.capture import GraphPool
from policies.vla.openvla import OpenVLAPolicy
from policies.vla.tiny.modeling import make_tokenizer
from stream.budgets.latency_card import LatencyCard
from stream.data import Budget, Observation
from stream.errors import ConfigError
from tests.policies.vla import openvla_parts as parts

REDUCERS = ("vla_pruner", "vla_pruner_input")


def subject(**changes: Any) -> tuple[VLASubject, Any]:
    """(a subject of 2 x 16 tokens, its tokenizer)"""
    model, tokenizer = parts.network("parallel", **changes), make_tokenizer([INSTRUCTION])
    return VLASubject("tiny", model.eval(), tokenizer), tokenizer


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("batch", [1, 2])
def test_fixed_shapes_act_as_the_growing_cache_does(reducer: str, batch: int) -> None:
    one, pool, method = subject()[0], GraphPool("cpu"), reducer_of(reducer)
    for how, retain in ((None, 1.0), (method, 0.25)):
        pair = [
            kinds.eager_arm(one, how, retain, batch),
            kinds.fixed_arm(one, how, retain, batch, pool),
        ]
        run = measure.interleaved(pair, repeats=1, warmup=0, seed=0)
        assert run.answers[pair[1].key].shape == (batch, 3, 2)
        (row,) = measure.rows_of(pair[1:], run)
        assert row["agreement"]["relative_error"] < 1e-5
        assert row["ms"]["action_head"]["n"] == 1


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("retain", [1.0, 0.25])
def test_it_acts_as_the_policy_does(reducer: str, retain: float) -> None:
    one, tokenizer = subject()
    method, model = reducer_of(reducer), one._model
    arm = kinds.eager_arm(one, method, retain, 1)
    (acted,) = measure.interleaved([arm], repeats=1, warmup=0, seed=5).answers.values()
    config: Any = model.config
    pictures = dict(zip(config.cameras, one.pixels(5).numpy(), strict=True))
    state = one.state[0].numpy() * np.array(config.state_std) + np.array(config.state_mean)
    policy = OpenVLAPolicy(model, tokenizer, method, capture="off")
    seen = Observation(pictures, state.astype(np.float32), INSTRUCTION, 0.0)
    prefix = policy.prefill(policy.encode(seen), Budget.ratio(retain, of=32), one.memory())
    chunk, _ = policy.act(prefix, seen)
    low, high = np.array(config.action_low), np.array(config.action_high)
    assert prefix.tokens == arm.layer_tokens[-1]
    np.testing.assert_allclose((acted[0].numpy() + 1) / 2 * (high - low) + low, chunk.actions, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("pointers", [0, 2])
def test_operations_of_the_encoder_are_counted_as_they_are_done(pointers: int) -> None:
    vision = parts.SIGLIP | {"num_channels": 16, "image_size": 8, "patch_size": 2}
    one, _ = subject(vision_configs=[vision], stem_channels=16, pointers=pointers)
    attention = one.grid.frames * 4.0 * 24 * 16 * 16
    with FlopCounterMode(display=False) as counter:
        one.encode(one.pixels(0), False)
    counted = counter.get_flop_counts()["Global"]
    kinds_counted = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution)
    assert one.encode_flops() == sum(counted.get(kind, 0) for kind in kinds_counted) + attention
    with FlopCounterMode(display=False) as scoring:
        one.encode(one.pixels(0), True)
    more = scoring.get_total_flops() - counter.get_total_flops()
    if pointers:
        assert one.score_flops() == more
    assert one.score_flops() > 0


def test_stages_behind_the_encoder_work_less_with_fewer_tokens() -> None:
    one, method = subject()[0], reducer_of("vla_pruner_input")
    work = [
        flops.request_flops(kinds.eager_arm(one, method if r < 1 else None, r, 1))
        for r in (1.0, 0.5, 0.25)
    ]
    for stage in ("prefill", "action_head"):
        counts = [w[stage] for w in work]
        assert counts == sorted(set(counts), reverse=True)
    assert [w["score"] > 0 for w in work] == [False, True, True]


def test_the_model_in_the_box_is_timed_with_its_own_cameras(tmp_path: Path) -> None:
    argv = ["bench", "step", "--model", "tiny-vla", "--retain", "0.25", "--repeats", "1"]
    argv += ["--reducer", "vla_pruner_input", "--threads", "1", "--warmup", "0", "--json"]
    result = CliRunner().invoke(app, [*argv, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "step_tiny_vla.json").read_text())
    assert told["weights"] == "real"
    assert told["grid"] == [2, 16, 16]
    assert [(r["arm"], r["kept"]) for r in told["rows"]] == [
        ("eager", 512),
        ("graph", 512),
        ("eager", 128),
        ("graph", 128),
    ]
    assert all(r["agreement"]["relative_error"] < 1e-4 for r in told["rows"][1::2])
    stages = set(LatencyCard.load(tmp_path / "card_tiny_vla.json").stages)
    assert stages == {"encode", "reduce", "prefill", "action_head"}


def test_many_steps_at_once_are_pruned_as_policies_are(tmp_path: Path) -> None:
    argv = ["bench", "throughput", "--model", "tiny-pi0", "--concurrency", "2", "--repeats", "1"]
    argv += ["--retain", "0.25", "--warmup", "0", "--threads", "1", "--json"]
    result = CliRunner().invoke(app, [*argv, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "throughput_tiny_pi0.json").read_text())
    assert told["reducer"] == "vla_pruner"
    assert [(r["batch"], r["kept"]) for r in told["rows"]] == [(2, 64), (2, 64), (2, 16), (2, 16)]


@pytest.mark.parametrize(
    ("command", "model", "other"), [("ttft", "tiny-vla", "step"), ("step", "tiny-video", "ttft")]
)
def test_the_wrong_command_names_the_right_one(command: str, model: str, other: str) -> None:
    result = CliRunner().invoke(app, ["bench", command, "--model", model])
    assert isinstance(result.exception, ConfigError)
    assert f"foveate bench {other}" in str(result.exception)


def test_other_cameras_than_its_own_are_refused() -> None:
    assert "tiny-vla" in shapes.names()
    with pytest.raises(ConfigError, match="tiny-vla has 2"):
        shapes.subject("tiny-vla", 0, 0, 3, "cpu", torch.float32)
