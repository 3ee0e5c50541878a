"""SmolVLA at its real size, with random weights: it runs, pruned and not, and says how long."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from policies.attach import attach
from tests.policies.vla import lerobot_models as models

TOKENS = 3 * 64
BUDGETS = (TOKENS, 64)


def check(device: str, repeats: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Inferences at full and at a third of the tokens; prints the median times."""
    policy = models.smolvla_full_size().to(device)
    policy.config.device = device
    batch = {key: value.to(device) for key, value in models.batch(pixels=512).items()}
    noise = torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(2)).to(device)

    def act() -> Any:
        return policy.predict_action_chunk(dict(batch), noise=noise).cpu()

    whole = act()
    lines = [f"SmolVLA, random weights, {device}, {torch.get_num_threads()} CPU threads:"]
    for budget in BUDGETS:
        times_s = []
        with attach(policy, "vla_pruner", budget=budget) as held:
            for _ in range(repeats):
                start = time.perf_counter()
                actions = act()
                times_s.append(time.perf_counter() - start)
        text = held.lengths[0] - TOKENS
        assert held.lengths == [TOKENS + text] * 3 + [budget + text] * 13
        assert torch.isfinite(actions).all()
        assert torch.equal(actions, whole) == (budget == TOKENS)
        median_s = sorted(times_s)[repeats // 2]
        lines.append(f"  {budget} of {TOKENS} tokens: {median_s * 1e3:.0f} ms, n = {repeats}")
    with capsys.disabled():
        print("", *lines, sep="\n")  # noqa: T201


@pytest.mark.slow
def test_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    check("cpu", 2, capsys)


@pytest.mark.gpu
@pytest.mark.slow
def test_on_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    check("cuda", 20, capsys)
