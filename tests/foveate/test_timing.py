"""The arms of the speed bench answer alike, and its files say what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from foveate.cli import app
from foveate.timing import arms, flops, measure, shapes
from policies.graphs import capture
from policies.graphs.capture import GraphPool
from stream.budgets.latency_card import LatencyCard
from stream.errors import UnknownNameError
from stream.registry import build_reducer

from ..policies.graphs.taped import ScarcePool


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def subject(name: str = "tiny-llava") -> shapes.Subject:
    return shapes.subject(name, 4, 3, 2, "cpu", torch.float32)


@pytest.mark.parametrize(
    ("name", "reducer"),
    [
        ("tiny-llava", "holitom"),
        ("tiny-llava", "fastv"),
        ("tiny-qwen2.5-vl", "holitom"),
        ("tiny-openvla", "vla_pruner"),
        ("tiny-openvla-oft", "vla_pruner"),
    ],
)
def test_fixed_shapes_answer_as_the_stock_model(name: str, reducer: str) -> None:
    one, pool, method = subject(name), GraphPool("cpu"), build_reducer(reducer)
    every = [
        arm
        for batch in (1, 2)
        for how, retain in ((None, 1.0), (method, 0.5))
        for arm in (
            arms.EagerArm(one, how, retain, batch),
            arms.FixedArm(one, how, retain, batch, pool),
        )
    ]
    for eager, fixed in zip(every[::2], every[1::2], strict=True):
        run = measure.interleaved([eager, fixed], repeats=1, warmup=0, seed=0)
        (row,) = measure.rows_of([fixed], run)
        agreed = row["agreement"]
        assert agreed.get("equal_tokens", 1.0) == 1.0
        assert agreed["relative_error"] < 1e-5
        assert eager.layer_tokens == fixed.layer_tokens
        assert fixed.layer_tokens == fixed.decoder.visual_tokens(fixed.bucket)


def test_a_question_on_an_attached_stream_is_answered_like_a_whole_prompt() -> None:
    one, pool = subject(), GraphPool("cpu")
    whole = arms.FixedArm(one, None, 1.0, 1, pool)
    attached = arms.AttachedArm(one, None, 1.0, 1, pool)
    answers = measure.interleaved([whole, attached], repeats=2, warmup=0, seed=3).answers
    assert torch.equal(answers[whole.key], answers[attached.key])


def test_fewer_tokens_are_fewer_operations_and_scoring_is_counted() -> None:
    one, method = subject(), build_reducer("holitom")
    by_share = [flops.request_flops(arms.EagerArm(one, method, r, 1)) for r in (0.5, 0.25, 0.1)]
    full = flops.request_flops(arms.EagerArm(one, None, 1.0, 1))
    assert full["score"] == 0
    assert all(f["score"] > 0 for f in by_share)
    prefills = [full["prefill"], *(f["prefill"] for f in by_share)]
    assert prefills == sorted(prefills, reverse=True)
    assert len(set(prefills)) == 4
    linear = one.text_model.config.num_hidden_layers * 2
    by_hand = linear * sum(m.numel() for m in one.text_model.layers[0].parameters() if m.ndim == 2)
    n = one.grid.size + one.prompt.before + one.prompt.after
    attention = 2 * n * n * one.text_model.config.hidden_size * 4
    head = 2 * one.head.weight.numel()
    assert full["prefill"] == pytest.approx(by_hand * n + attention + head)


def test_leaner_encoders_cost_fewer_operations_and_say_their_error() -> None:
    one = shapes.subject("tiny-video", 8, 1, 1, "cpu", torch.float32)
    method, pool = build_reducer("holitom"), GraphPool("cpu")
    kinds = (arms.FixedArm, arms.MergingArm, arms.SkippingArm)
    every = [kind(one, method, 0.1, 1, pool) for kind in kinds]
    run = measure.interleaved(every, repeats=1, warmup=0, seed=0)
    exact, merging, skipping = measure.rows_of(every, run)
    assert exact["feature_error"] is None
    for lean in (merging, skipping):
        assert lean["tflop"]["encode"] < exact["tflop"]["encode"]
        assert 0 < lean["feature_error"] < 1


def test_a_shape_that_does_not_exist_names_those_that_do() -> None:
    with pytest.raises(UnknownNameError, match="openvla-7b"):
        shapes.subject("openvla-8b", 4, 3, 1, "cpu", torch.float32)


@pytest.mark.parametrize(
    ("command", "model"),
    [("ttft", "tiny-llava"), ("step", "tiny-openvla-oft"), ("step", "tiny-smolvla")],
)
def test_latency_commands_write_rows_and_a_card(command: str, model: str, tmp_path: Path) -> None:
    argv = ["bench", command, "--model", model, "--retain", "0.5,0.25", "--repeats", "2"]
    argv += ["--threads", "1", "--warmup", "0", "--soak", "20", "--out", str(tmp_path), "--json"]
    argv += ["--frames", "4", "--decode", "2"] if command == "ttft" else []
    result = CliRunner().invoke(app, argv)
    assert result.exit_code == 0, result.output
    stem = model.replace("-", "_")
    told = json.loads((tmp_path / f"{command}_{stem}.json").read_text())
    keys = [(r["arm"], r["retain"]) for r in told["rows"]]
    assert {("eager", 1.0), ("graph", 1.0), ("eager", 0.5), ("graph", 0.25)} <= set(keys)
    assert len(keys) == len(set(keys))
    assert ("attached", 0.25) in keys if command == "ttft" else ("attached", 0.25) not in keys
    assert all(r["ms"]["first"]["n"] == 2 for r in told["rows"])
    assert told["soak"]["steps"] >= 20
    assert not told["soak"]["grown"]
    card = LatencyCard.load(tmp_path / f"card_{stem}.json")
    assert set(card.stages) >= {"encode", "reduce", "prefill"}
    assert ("flow_step" in card.stages) == (model == "tiny-smolvla")
    assert told["us_per_token"].keys() >= {"eager", "graph"}


def test_throughput_counts_requests(tmp_path: Path) -> None:
    argv = ["bench", "throughput", "--model", "tiny-llava", "--concurrency", "1,2", "--frames", "4"]
    argv += ["--decode", "1", "--repeats", "1", "--warmup", "0", "--threads", "1", "--json"]
    argv += ["--out", str(tmp_path)]
    result = CliRunner().invoke(app, argv)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "throughput_tiny_llava.json").read_text())["rows"]
    assert [r["batch"] for r in rows] == [1] * 4 + [2] * 4
    for row in rows:
        per_request = row["ms"]["host"]["p50"] / row["batch"] / 1e3
        assert row["requests_per_s"] == pytest.approx(1 / per_request)


def test_an_arm_that_runs_out_of_memory_later_has_no_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = subject()
    able = arms.EagerArm(one, None, 1.0, 1)
    greedy = arms.EagerArm(one, build_reducer("fastv"), 0.5, 1)
    run_it, left = type(greedy).run, [1]

    def run(arm: Any, *given: Any) -> Any:
        if arm is greedy and not left:
            raise torch.cuda.OutOfMemoryError
        if arm is greedy:
            left.pop()
        return run_it(arm, *given)

    monkeypatch.setattr(type(greedy), "run", run)
    found = measure.interleaved([able, greedy], repeats=2, warmup=0, seed=0)
    assert list(found.samples) == [able.key]
    assert found.left_out == {greedy.key: "out of memory"}
    rows = measure.rows_of([able, greedy], found)
    assert [bool(row["ms"]) for row in rows] == [True, False]


@pytest.mark.parametrize("room", [0, 4])
@torch.inference_mode()
def test_an_arm_whose_graphs_do_not_fit_is_left_out_and_says_why(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its programs would be launched kernel by kernel, which is no time of graphs."""
    monkeypatch.setattr(capture, "GraphPool", partial(ScarcePool, room=room))
    argv = ["bench", "throughput", "--model", "tiny-llava", "--concurrency", "1", "--frames", "4"]
    argv += ["--decode", "1", "--repeats", "1", "--warmup", "0", "--threads", "1", "--json"]
    argv += ["--out", str(tmp_path)]
    with pytest.warns(UserWarning, match="out of memory while capturing"):
        result = CliRunner().invoke(app, argv)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "throughput_tiny_llava.json").read_text())["rows"]
    timed = [(row["arm"], row["retain"]) for row in rows if row["ms"]]
    assert timed == [("eager", 1.0), *[("graph", 1.0)] * (room > 0), ("eager", 0.1)]
    for row in rows:
        assert bool(row["left_out"]) == (not row["ms"]) == ("requests_per_s" not in row)
    what = "prefill of 6 visual tokens" if room else "encoder of tiny-llava"
    why = rf"not captured: The {what}.*: out of memory while capturing\.; "
    assert re.match(why, rows[-1]["left_out"])
