"""The chain of farthest picks as one kernel: on a GPU, or interpreted where there is none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.ops import similarity, spread

pytest.importorskip("triton")
from stream.ops import spread_cuda

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning:triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 9999), st.integers(1, 3), st.integers(1, 40), st.data())
def test_one_kernel_picks_what_the_chain_picks(
    seed: int, groups: int, n: int, data: st.DataObject
) -> None:
    """Few distinct distances, so that many tie; some or all points may not be picked."""
    draw = torch.Generator().manual_seed(seed)
    k = data.draw(st.integers(1, n))
    distance = torch.randint(0, 4, (groups, n, n), generator=draw).float()
    invalid = torch.rand(groups, n, generator=draw) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    isolation = distance.amin(-1).masked_fill(invalid, -torch.inf)
    picks = spread_cuda.chain(distance.to(DEVICE), isolation.to(DEVICE), k)
    assert torch.equal(picks.cpu(), spread.chain(distance, isolation, k))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 9999), st.integers(1, 3), st.integers(1, 40))
def test_distances_and_isolation_are_the_operators(seed: int, groups: int, n: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x, valid = (
        torch.randn(groups, n, 3, generator=draw),
        torch.rand(groups, n, generator=draw) < 0.7,
    )
    x[:, 0] = 0.0
    want = (1.0 - similarity.pairwise_cosine(x)).diagonal_scatter(
        torch.full((groups, n), torch.inf), dim1=1, dim2=2
    )
    distance, isolation = spread_cuda.apart((x @ x.mT).to(DEVICE), valid.to(DEVICE))
    assert torch.allclose(distance.cpu(), want, atol=1e-5)
    nearest = distance.cpu().masked_fill(~valid[:, None, :], torch.inf).amin(-1)
    assert torch.equal(isolation.cpu(), nearest.masked_fill(~valid, -torch.inf))


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 33, 256, 777, 3000, spread_cuda.LARGEST])
def test_a_gpu_picks_what_a_cpu_picks_from_the_same_distances(n: int) -> None:
    draw = torch.Generator().manual_seed(n)
    distance = torch.randint(0, 1000, (2, n, n), generator=draw).float()
    isolation, k = torch.randint(0, 1000, (2, n), generator=draw).float(), min(n, 300)
    isolation[:, : n // 3] = -torch.inf
    picks = spread_cuda.chain(distance.cuda(), isolation.cuda(), k)
    assert torch.equal(picks.cpu(), spread.chain(distance, isolation, k))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_picks_what_a_cpu_picks(dtype: torch.dtype) -> None:
    """Where a disturbance far above rounding changes no pick; duplicates and invalid points too."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 12, 8, generator=draw).to(dtype)
    x[:, 5] = x[:, 2]
    valid = torch.rand(64, 12, generator=draw) < 0.8
    near = x.double() + 1e-4 * torch.randn(x.shape, generator=draw, dtype=torch.float64)
    near[:, 5] = near[:, 2]
    picks = spread.farthest(x, valid, 14)
    stable = (spread.farthest(near, valid, 14) == picks).all(-1)
    assert int(stable.sum()) > 40
    assert spread.kernels_for(x.cuda()) is spread_cuda
    on_gpu = spread.farthest(x.cuda(), valid.cuda(), 14).cpu()
    assert torch.equal(on_gpu[stable], picks[stable])
