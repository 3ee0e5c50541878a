"""Sum and norm as one kernel: on a GPU, or interpreted where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from policies.graphs.encoder import Sum

pytest.importorskip("triton")
from policies.graphs import encoder_cuda

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BFLOAT16 = 2.0**-7
"""Relative error of a rounding; interpreted, it cuts off."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (1, 3, 1100)])
@pytest.mark.parametrize("kind", ["norm", "add", "scaled"])
def test_one_kernel_adds_and_norms_as_the_operators_do(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    draw, size = torch.Generator().manual_seed(0), shape[-1]
    x, added = (torch.randn(2, *shape, generator=draw) * 3 + 1).to(dtype)
    factor, weight, bias = torch.randn(3, size, generator=draw).to(dtype)
    more, scale = (None if kind == "norm" else added), (factor if kind == "scaled" else None)
    given = [None if t is None else t.to(DEVICE) for t in (x, more, scale, weight, bias)]
    total, normed = encoder_cuda.add_norm(*given, 1e-3)  # type: ignore[arg-type]
    assert total.dtype == normed.dtype == dtype
    exact = Sum(*(None if t is None else t.float() for t in (x, more, scale)))  # type: ignore[arg-type]
    tolerance = 1e-5 if dtype == torch.float32 else BFLOAT16
    assert torch.allclose(total.float().cpu(), exact.total(), atol=tolerance, rtol=tolerance)
    norm = nn.LayerNorm(size, eps=1e-3)
    norm.weight.data, norm.bias.data = weight.float(), bias.float()
    _, want = Sum(total.float().cpu()).normed(norm)
    loose = 1e-4 if dtype == torch.float32 else 2 * tolerance
    assert torch.allclose(normed.float().cpu(), want, atol=loose, rtol=loose)


def test_rows_need_not_lie_one_behind_the_other() -> None:
    x, weight = torch.randn(2, 6, 3, device=DEVICE).transpose(1, 2), torch.ones(6, device=DEVICE)
    total, normed = encoder_cuda.add_norm(x, x, None, weight, 0 * weight, 1e-6)
    assert torch.allclose(total, 2 * x)
    assert torch.allclose(normed, torch.nn.functional.layer_norm(2 * x, (6,)), atol=1e-4)
