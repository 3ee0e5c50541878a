"""Short rows sorted by one kernel: on a GPU, or interpreted where there is none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stream.ops import picks

pytest.importorskip("triton")
from stream.ops import order_cuda

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning:triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rows(seed: int, b: int, n: int, dtype: torch.dtype) -> Tensor:
    """Few distinct values, so that many tie; floats with both zeros, both infinities and NaN."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 9, (b, n), generator=draw)
    if dtype.is_floating_point:
        some = [-torch.inf, -2.0, -1e-40, -0.0, 0.0, 1e-40, 3.0, torch.inf, torch.nan]
        return torch.tensor(some, dtype=dtype)[x]
    return (x - 4).to(dtype) << (40 if dtype == torch.int64 else 0)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 9999),
    st.integers(1, 3),
    st.integers(1, 40),
    st.sampled_from(order_cuda.DTYPES),
    st.booleans(),
)
def test_the_kernel_orders_as_a_stable_sort(
    seed: int, b: int, n: int, dtype: torch.dtype, descending: bool
) -> None:
    x = rows(seed, b, n, dtype)
    want = picks.ordered(x, descending)
    values, order = order_cuda.ordered(x.to(DEVICE), descending)
    assert torch.equal(order.cpu(), want[1])
    assert torch.equal(values.cpu().nan_to_num(7.0), want[0].nan_to_num(7.0))
    assert torch.equal(order_cuda.ranks(x.to(DEVICE)).cpu(), picks.ranks(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", order_cuda.DTYPES)
@pytest.mark.parametrize("n", [1, 33, 1000, 3000, order_cuda.LARGEST])
def test_a_gpu_takes_the_kernel_and_says_what_a_cpu_says(n: int, dtype: torch.dtype) -> None:
    x = rows(n, 2, n, dtype)
    assert picks._kernels_for(x.cuda()) is order_cuda
    for descending in (False, True):
        values, order = picks.ordered(x.cuda(), descending)
        assert torch.equal(order.cpu(), picks.ordered(x, descending)[1])
        assert torch.equal(values, x.cuda().take_along_dim(order, 1)) or dtype.is_floating_point
    assert torch.equal(picks.ranks(x.cuda()).cpu(), picks.ranks(x))
