"""Works side by side give what they give one after the other."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from policies.graphs.branches import at_once
from policies.graphs.capture import GraphPool, Program


def powers(x: Tensor) -> list[Tensor]:
    """x, x^2, x^3 for a matrix of some size, each a chain of kernels."""
    works = [partial(torch.linalg.matrix_power, x, n) for n in (1, 2, 3)]
    return at_once(x.device, works)


def test_on_a_cpu_they_run_in_order() -> None:
    order: list[int] = []

    def work(i: int) -> Tensor:
        order.append(i)
        return torch.tensor(i)

    said = at_once(torch.device("cpu"), [partial(work, i) for i in range(3)])
    assert [int(t) for t in said] == order == [0, 1, 2]


@pytest.mark.gpu
@torch.inference_mode()
def test_on_a_gpu_they_give_the_same_eagerly_and_captured() -> None:
    draw = torch.Generator().manual_seed(0)
    program = Program(GraphPool("cuda"), "Powers", lambda x: tuple(powers(x)))
    for _ in range(5):
        x = torch.randn(256, 256, generator=draw) * 0.05
        want = powers(x)
        for got in (powers(x.cuda()), program(x.cuda())):
            for one, other in zip(got, want, strict=True):
                assert torch.allclose(one.cpu(), other, atol=1e-4)
