"""Policies at their real size, with random weights: they run, pruned and not, and say how long."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from policies.attach import attach
from policies.graphs.wanted import Capture
from policies.vla.base import VLAPolicy
from policies.vla.flow_policy import FlowPolicy
from policies.vla.openvla import OpenVLAPolicy
from policies.vla.openvla_model import OpenVLA, openvla_7b
from policies.vla.tiny.modeling import make_tokenizer
from stream.data import Budget, Observation
from stream.memory import Memory
from stream.reducers.vla_pruner import VLAPruner
from tests.policies.vla import lerobot_models as models


def check(kind: str, device: str, repeats: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Inferences with all tokens and with a quarter of them; prints the median times.

    On a CPU it is the time that the process computed, which other processes hardly change.
    """
    clock, name = (time.process_time, "CPU") if device == "cpu" else (time.perf_counter, "wall")
    with torch.device(device):
        policy = models.full_size(kind, device)
    pixels, tokens = (512, 3 * 64) if kind == "smolvla" else (224, 3 * 256)
    batch = {key: value.to(device) for key, value in models.batch(pixels=pixels).items()}
    noise = torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(2)).to(device)

    def act() -> Any:
        return policy.predict_action_chunk(dict(batch), noise=noise).cpu()

    whole = act()
    lines = [f"{kind}, random weights, {device}, {torch.get_num_threads()} threads, {name} time:"]
    for budget in (tokens, tokens // 4):
        times_s = []
        with attach(policy, "vla_pruner", budget=budget) as held:
            for _ in range(repeats):
                start = clock()
                actions = act()
                times_s.append(clock() - start)
        text = held.lengths[0] - tokens
        assert held.lengths[:4] == [tokens + text] * 3 + [budget + text]
        assert torch.isfinite(actions).all()
        assert torch.equal(actions, whole) == (budget == tokens)
        median_s = sorted(times_s)[repeats // 2]
        lines.append(f"  {budget} of {tokens} tokens: {median_s * 1e3:.0f} ms, n = {repeats}")
    with capsys.disabled():
        print("", *lines, sep="\n")  # noqa: T201


@pytest.mark.slow
def test_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    check("smolvla", "cpu", 2, capsys)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["smolvla", "pi0", "pi05"])
def test_on_the_gpu(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    check(kind, "cuda", 20, capsys)


TEXT = "put the red block into the drawer"
CAMERAS = ["front", "wrist"]


def steps_ms(
    one: VLAPolicy, px: int, tokens: int, repeats: int
) -> tuple[dict[str, float], np.ndarray]:
    """Median milliseconds of each phase of a control step, warm, and the actions of the last."""
    memory, rng = Memory(), np.random.default_rng(0)
    images = {c: rng.integers(0, 256, (px, px, 3), dtype=np.uint8) for c in one.spec.cameras}
    taken: dict[str, list[float]] = {"encode": [], "prefill": [], "act": []}

    def timed(phase: str, call: Any) -> Any:
        start = time.perf_counter()
        result = call()
        if one.device.type == "cuda":
            torch.cuda.synchronize()
        taken[phase].append((time.perf_counter() - start) * 1e3)
        return result

    for step in range(repeats + 3):
        seen = Observation(images, np.zeros(one.spec.state_size, np.float32), TEXT, 0.1 * step)
        scene = timed("encode", lambda seen=seen: one.encode(seen))
        prefix = timed("prefill", lambda s=scene: one.prefill(s, Budget(tokens), memory))
        chunk, attention = timed("act", lambda p=prefix, seen=seen: one.act(p, seen))
        one.remember(prefix, attention, memory)
    return {phase: statistics.median(ms[3:]) for phase, ms in taken.items()}, chunk.actions


def check_captured(
    name: str,
    build: Callable[[Capture], OpenVLAPolicy | FlowPolicy],
    px: int,
    repeats: int,
    capsys: pytest.CaptureFixture[str],
) -> float:
    """Control steps as they stand and in fixed shapes; prints the median times, and returns by how
    much the actions differ at most.

    build: the policy, captured or not. px: side of its pictures.
    """
    lines, largest = [f"{name}, random weights, n = {repeats}:"], 0.0
    n = build("off").spec.grid.size
    for tokens in (n, n // 4):
        answers = []
        for capture in ("off", "on"):
            one = build(capture)
            times_ms, actions = steps_ms(one, px, tokens, repeats)
            answers.append(actions)
            told = ", ".join(f"{phase} {ms:.1f} ms" for phase, ms in times_ms.items())
            lines.append(f"  {tokens} of {n} tokens, capture {capture}: {told}")
            if one.captured is not None:
                pool = one.captured.pool
                assert pool.fallen_back == []
                lines.append(f"    {pool.captured} graphs in {pool.warmup_s:.1f} s")
        difference = float(np.abs(answers[0] - answers[1]).max())
        lines.append(f"    actions differ by at most {difference:.4f}")
        assert np.isfinite(answers).all()
        largest = max(largest, difference)
    with capsys.disabled():
        print("", *lines, sep="\n")  # noqa: T201
    return largest


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("shape", [{"head": "parallel", "chunk": 8}, {"head": "autoregressive"}])
def test_openvla_on_the_gpu(shape: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = OpenVLA(openvla_7b(cameras=CAMERAS, **shape))
    finally:
        torch.set_default_dtype(default)
    tokenizer = make_tokenizer([TEXT])

    def build(capture: Capture) -> OpenVLAPolicy:
        return OpenVLAPolicy(model, tokenizer, VLAPruner(), capture=capture)

    name = f"OpenVLA, {model.config.head}, {model.device}"
    check_captured(name, build, model.config.image_px, 20, capsys)


@pytest.fixture
def rounded_factors() -> Iterator[None]:
    """Products of float32 as `load` sets them."""
    products = torch.backends.cuda.matmul
    before, products.allow_tf32 = products.allow_tf32, True
    yield
    products.allow_tf32 = before


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["smolvla", "pi0", "pi05"])
@pytest.mark.usefixtures("rounded_factors")
def test_flow_policies_on_the_gpu(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device("cuda"):
        policy = models.full_size(kind, "cuda")
    parts = policy, *models.processors(policy)

    def build(capture: Capture) -> FlowPolicy:
        return FlowPolicy(*parts, VLAPruner(), capture=capture)

    assert check_captured(f"{kind}, cuda", build, 224, 20, capsys) < 0.05
