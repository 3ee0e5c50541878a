"""Rotation and gate as one kernel each: on a GPU, or interpreted where there is none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.graphs import layer

pytest.importorskip("triton")
from policies.graphs import layer_cuda

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BFLOAT16 = 2.0**-7
"""Relative error of a rounding; interpreted, it cuts off."""


@settings(deadline=None, max_examples=15)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    st.sampled_from([2, 6, 16, 80]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_one_kernel_rotates_as_the_operators_do(
    b: int, n: int, heads: tuple[int, int], d: int, shared: bool, dtype: torch.dtype
) -> None:
    """Tables of each sequence or shared ones, whose halves differ."""
    draw = torch.Generator().manual_seed(b * n * d)
    query, key = (torch.randn(b, n, h, d, generator=draw).to(dtype) for h in heads)
    cos, sin = torch.randn(2, 1 if shared else b, n, d, generator=draw).to(dtype)
    got = layer_cuda.rotate(*(t.to(DEVICE) for t in (query, key, cos, sin)))
    exact = layer.rotate(query.float(), key.float(), cos.float(), sin.float())
    for one, want in zip(got, exact, strict=True):
        assert one.dtype == dtype
        tolerance = 1e-6 if dtype == torch.float32 else BFLOAT16
        assert torch.allclose(one.float().cpu(), want, atol=1e-6, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (2, 3, 5), (1, 3, 1000)])
def test_one_kernel_gates_as_the_operators_do(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(2, *shape, generator=draw) * 20).to(dtype)
    got = layer_cuda.silu_gate(gate.to(DEVICE), up.to(DEVICE))
    exact = F.silu(gate.float()) * up.float()
    tolerance = 1e-5 if dtype == torch.float32 else BFLOAT16
    assert torch.allclose(got.float().cpu(), exact, atol=1e-5, rtol=tolerance)
