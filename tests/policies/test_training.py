"""The course of the learning rates, by numbers, and who is stepped by what."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from policies.training import MuonAndAdam, Schedule
from policies.video.tiny import train as video
from policies.vla.tiny import train as vla

MOMENTS = ((0, 0.0), (99, 30.0), (149, 100.0), (500, 255.0), (9000, 500.0), (9000, 600.0))


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        (
            vla.schedule_of(vla.Recipe()),
            (0.005, 0.49578584217176574, 0.6817631037122474, 0.505, 0.010938852275163169, 0.01),
        ),
        (
            video.schedule_of(video.Recipe()),
            (
                0.006666666666666667,
                0.6612327877642923,
                0.9119540573619603,
                0.5189493884233932,
                0.022323073392314468,
                0.02,
            ),
        ),
    ],
    ids=["vla", "video"],
)
def test_the_shipped_schedules(schedule: Schedule, shares: tuple[float, ...]) -> None:
    given = [schedule.share(step, elapsed_s) for step, elapsed_s in MOMENTS]
    assert given == pytest.approx(shares, rel=1e-12)


def test_steps_end_a_schedule_as_minutes_do() -> None:
    schedule = Schedule(minutes=1, max_steps=10, warmup_steps=1, last=0.1)
    assert schedule.share(5, 0.0) == pytest.approx(schedule.share(0, 30.0))
    assert schedule.share(10, 0.0) == pytest.approx(0.1)


def test_matrices_are_stepped_by_muon_and_the_rest_by_adam() -> None:
    matrix, bias = nn.Parameter(torch.eye(4)), nn.Parameter(torch.ones(4))
    optimizer = MuonAndAdam(
        [matrix], [bias], muon_lr=0.1, adam_lr=0.01, beta2=0.95, weight_decay=0.5
    )
    gradients = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), torch.ones(4)

    def step(share: float) -> None:
        matrix.grad, bias.grad = gradients[0].clone(), gradients[1].clone()
        optimizer.step(share)

    step(0.0)
    assert torch.equal(matrix, torch.eye(4))
    assert torch.equal(bias, torch.ones(4))
    step(0.5)
    torch.testing.assert_close(bias, torch.full((4,), 1 - 0.5 * 0.01))
    shrunk = torch.eye(4) * (1 - 0.5 * 0.1 * 0.5)
    change = matrix - shrunk
    torch.testing.assert_close(change.norm(), torch.tensor(0.5 * 0.1 * 0.2 * 4), rtol=0.3, atol=0)
