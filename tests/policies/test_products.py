"""Filled up products say what plain ones say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policies import products


class OnGpu(Tensor):
    """Says that it lies on a GPU."""

    is_cuda = True  # type: ignore[assignment]


@pytest.mark.parametrize("out", [1, 7, 8])
@pytest.mark.parametrize("inside", [5, 16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_filled_up_product_says_the_same(out: int, inside: int, bias: bool, device: str) -> None:
    plain = nn.Linear(inside, out, bias=bias).to(device)
    given: Any = torch.randn(2, 3, inside, device=device)
    want = plain(given)
    if device == "cpu":
        given = given.as_subclass(OnGpu)
    got = products.linear(given, plain.weight, plain.bias)
    assert got.shape == (2, 3, out)
    assert torch.allclose(got.as_subclass(Tensor), want, atol=1e-5)


def test_elsewhere_it_is_the_usual_product() -> None:
    narrow = products.NarrowLinear(5, 3)
    x = torch.randn(4, 5)
    assert torch.equal(narrow(x), F.linear(x, narrow.weight, narrow.bias))
