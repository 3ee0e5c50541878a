"""Programs: the same results captured and not, one warning where capture fails."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from policies.graphs.capture import GraphPool, Program


def counting(device: str, pool: GraphPool) -> tuple[Program, Tensor]:
    """A program that counts its runs in a tensor and scales its input by the count."""
    count = torch.zeros(1, device=device)

    def work(x: Tensor) -> tuple[Tensor, Tensor]:
        count.add_(1)
        return x * count, x.sum()[None]

    return Program(pool, "The test", work, state=[count]), count


def test_without_a_gpu_the_work_runs_as_it_stands() -> None:
    pool = GraphPool("cpu")
    program, count = counting("cpu", pool)
    x = torch.arange(4.0)
    for turn in (1, 2, 3):
        scaled, total = program(x)
        assert torch.equal(scaled, x * turn)
        assert total.tolist() == [6.0]
    assert count.tolist() == [3.0]
    assert (pool.captured, pool.warmup_s, pool.fallen_back) == (0, 0.0, [])


@pytest.mark.gpu
def test_warming_up_leaves_state_alone_and_replays_follow_new_values() -> None:
    pool = GraphPool("cuda")
    program, count = counting("cuda", pool)
    for turn in (1, 2, 3):
        x = torch.full((4,), float(turn), device="cuda")
        scaled, total = program(x)
        assert torch.equal(scaled, x * turn)
        assert total.tolist() == [4.0 * turn]
    assert count.tolist() == [3.0]
    assert pool.captured == 1


@pytest.mark.gpu
def test_two_programs_of_one_pool_keep_their_outputs_apart() -> None:
    pool = GraphPool("cuda")
    double = Program(pool, "double", lambda x: (x * 2,))
    square = Program(pool, "square", lambda x: ((x + 0) * (x * 1),))
    x = torch.arange(1000.0, device="cuda")
    (first,) = double(x)
    (second,) = square(x)
    double(x)
    square(x)
    assert torch.equal(first, x * 2)
    assert torch.equal(second, x * x)


@pytest.mark.gpu
def test_what_waits_for_the_device_falls_back_with_one_warning() -> None:
    pool = GraphPool("cuda")
    waits = Program(pool, "Waiting", lambda x: (x[: int(x[0])],))
    x = torch.full((8,), 3.0, device="cuda")
    with pytest.warns(UserWarning, match="Waiting") as seen:
        (head,) = waits(x)
    assert head.tolist() == [3.0] * 3
    assert waits(x)[0].tolist() == [3.0] * 3
    assert len(seen) == 1
    fine = Program(pool, "Fine", lambda x: (x + 1,))
    assert fine(x)[0].tolist() == [4.0] * 8
    assert pool.captured == 1
