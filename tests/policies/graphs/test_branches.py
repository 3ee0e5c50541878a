"""Works side by side give what they give one after the other."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from policies.graphs import branches
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


class Noted:
    """A stream that notes which ones wait for which."""

    def __init__(self, name: str, waits: list[str]) -> None:
        self.name, self._waits = name, waits

    def wait_stream(self, other: Any) -> None:
        self._waits.append(f"{self.name} for {other.name}")


@pytest.mark.parametrize("fails", [0, 1, 2])
@torch.inference_mode()
def test_where_one_fails_all_streams_come_back(fails: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture in which one has not come back cannot be ended."""
    waits: list[str] = []
    here = Noted("here", waits)
    cuda = SimpleNamespace(current_stream=lambda device: here, stream=lambda aside: nullcontext())
    monkeypatch.setattr(branches.torch, "cuda", cuda)
    monkeypatch.setattr(branches, "_stream", lambda device, i: Noted(f"aside {i}", waits))

    def work(i: int) -> Tensor:
        if i == fails:
            raise RuntimeError(f"work {i} failed")
        return torch.ones(1)

    with pytest.raises(RuntimeError, match=f"work {fails} failed"):
        at_once(torch.device("cuda"), [partial(work, i) for i in range(3)])
    forks = ["aside 0 for here", "aside 1 for here"]
    assert waits == [*forks, "here for aside 0", "here for aside 1"]


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
