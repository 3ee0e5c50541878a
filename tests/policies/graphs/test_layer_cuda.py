"""Rotation, gate and norm as one kernel each: on a GPU, or interpreted where there is none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.activations import ACT2FN

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
    both = torch.randn(b, n, sum(heads), d, generator=draw).to(dtype)
    query, key = both.split(heads, 2)
    cos, sin = torch.randn(2, 1 if shared else b, n, d, generator=draw).to(dtype)
    got = layer_cuda.rotate(*(t.to(DEVICE) for t in (query, key, cos, sin)))
    exact = layer.rotate(query.float(), key.float(), cos.float(), sin.float())
    for one, want in zip(got, exact, strict=True):
        assert one.dtype == dtype
        tolerance = 1e-6 if dtype == torch.float32 else BFLOAT16
        assert torch.allclose(one.float().cpu(), want, atol=1e-6, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (1, 3, 1100)])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("function", ["silu", "gelu_pytorch_tanh"])
def test_one_kernel_gates_as_the_operators_do(
    function: str, shape: tuple[int, ...], apart: bool, dtype: torch.dtype
) -> None:
    """Of tensors of their own, and of the halves of one."""
    draw = torch.Generator().manual_seed(0)
    both = (torch.randn(*shape[:2], 2 * shape[2], generator=draw) * 20).to(dtype).to(DEVICE)
    halves = both.chunk(2, -1)
    gate, up = (half.clone() for half in halves) if apart else halves
    activation = ACT2FN[function]
    got = getattr(layer_cuda, layer.FUSED[type(activation)])(gate, up)
    gate, up = gate.cpu(), up.cpu()
    exact = activation(gate.float()) * up.float()
    tolerance = 1e-5 if dtype == torch.float32 else BFLOAT16
    assert torch.allclose(got.float().cpu(), exact, atol=1e-5, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (1, 3, 1100)])
def test_one_kernel_adds_and_norms_as_the_operators_do(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    draw = torch.Generator().manual_seed(0)
    x, more = (torch.randn(2, *shape, generator=draw) * 3).to(dtype)
    weight = torch.randn(shape[-1], generator=draw).to(dtype)
    total, normed = layer_cuda.add_norm(x.to(DEVICE), more.to(DEVICE), weight.to(DEVICE), 1e-3)
    tolerance = 1e-5 if dtype == torch.float32 else BFLOAT16
    assert torch.allclose(total.float().cpu(), x.float() + more.float(), atol=0, rtol=tolerance)
    _, want = layer.add_norm(total.float().cpu(), torch.zeros(()), weight.float(), 1e-3)
    assert torch.allclose(normed.float().cpu(), want, atol=1e-5, rtol=2 * tolerance)
