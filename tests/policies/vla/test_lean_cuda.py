"""Softmax, norm and rotation as one kernel each: on a GPU, or interpreted where there is none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from policies.vla import lean

pytest.importorskip("triton")
from policies.vla import lean_cuda

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BFLOAT16 = 2.0**-7
"""Relative error of a rounding; interpreted, it cuts off."""

KINDS = st.sampled_from([torch.float32, torch.bfloat16])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor) -> bool:
    assert got.shape == want.shape
    tolerance = 1e-5 if got.dtype == torch.float32 else BFLOAT16
    return torch.allclose(got.float().cpu(), want.float(), atol=1e-5, rtol=tolerance)


@settings(deadline=None, max_examples=20)
@given(
    st.integers(1, 3),
    st.sampled_from([(1, 1), (1, 8), (5, 3)]),
    st.integers(1, 4),
    st.sampled_from([1, 7, 64, 1100]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    KINDS,
)
def test_one_kernel_is_a_masked_softmax(
    b: int,
    heads: tuple[int, int],
    n: int,
    m: int,
    adds: bool,
    wider: bool,
    shared: bool,
    kind: torch.dtype,
) -> None:
    """Masks added or not, parts of wider ones, shared or not; some rows see nothing."""
    held, groups = heads
    logits = (randn(b, held, n * groups, m) * 5).to(kind)
    mask = (randn(1 if shared else b, 1, n, m + 3 * wider, seed=m) > 0)[..., :m]
    if adds:
        mask = torch.where(mask, 0.0, -2.3819763e38)
    got = lean_cuda.masked_softmax(logits.to(DEVICE), mask.to(DEVICE), 0.7, groups)
    assert got.dtype == kind
    assert close(got, lean.masked_softmax(logits.float(), mask, 0.7, groups))


@settings(deadline=None, max_examples=20)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([1, 5, 64, 1100]),
    st.sampled_from(["shared", "of each sequence", "shifted"]),
    KINDS,
    KINDS,
)
def test_one_kernel_norms(
    b: int, n: int, size: int, scaled: str, kind: torch.dtype, out: torch.dtype
) -> None:
    x = (randn(b, n, size) * 3).to(kind)
    scale, shift, _ = randn(b, 3 * size, seed=1).chunk(3, -1)
    scale = scale[0] if scaled == "shared" else scale
    shifts = shift if scaled == "shifted" else None
    given_ = (scale.to(DEVICE), None if shifts is None else shifts.to(DEVICE), 1.0, 1e-3)
    got = lean_cuda.norm(x.to(DEVICE), *given_, out)
    assert got.dtype == out
    assert close(got, lean.norm(x.float(), scale, shifts, 1.0, 1e-3, torch.float32))


@settings(deadline=None, max_examples=20)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from([2, 6, 64]),
    st.booleans(),
    KINDS,
)
def test_one_kernel_turns(
    b: int, n: int, heads: int, d: int, shared: bool, kind: torch.dtype
) -> None:
    x = randn(b, n, heads, d).to(kind)
    positions = torch.arange(900, 900 + b * n).view(b, n)
    positions = positions[:1].expand(b, n) if shared else positions
    timescale = 10_000 ** (torch.arange(d // 2) / (d // 2))
    got = lean_cuda.rope(x.to(DEVICE), positions.to(DEVICE), timescale.to(DEVICE))
    assert got.dtype == kind
    want = lean.rope(x.float(), positions, timescale)
    tolerance = 1e-5 if kind == torch.float32 else BFLOAT16
    assert torch.allclose(got.float().cpu(), want, atol=1e-4, rtol=tolerance)
