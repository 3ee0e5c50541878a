"""Policies at their real size, with random weights: they run, pruned and not, and say how long."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from policies.attach import attach
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
