"""DPC-KNN's kernels: on a GPU, or interpreted where there is none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stream.ops import clusters, similarity

pytest.importorskip("triton")
from stream.ops import clusters_cuda

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning:triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def groups(seed: int, b: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(centred points float32 [b, n, 3], how many of each group exist long [b], bool [b, n])."""
    draw = torch.Generator().manual_seed(seed)
    size = torch.randint(1, n + 1, (b,), generator=draw)
    valid = torch.arange(n) < size[:, None]
    x = torch.randn(b, n, 3, generator=draw) * valid[..., None]
    return similarity.centred(x, size), size, valid


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 9999), st.integers(1, 3), st.integers(1, 20), st.integers(1, 9))
def test_kernels_say_what_the_operators_say(seed: int, b: int, n: int, neighbours: int) -> None:
    x, size, valid = groups(seed, b, n)
    want = similarity.distances(x)
    got = clusters_cuda.distances((x @ x.mT).to(DEVICE), 3).cpu()
    assert torch.allclose(got, want, atol=1e-3)
    assert float(got.diagonal(dim1=1, dim2=2).abs().max()) == 0.0

    near = size.clamp_max(neighbours)
    boost = torch.rand(b, n) if seed % 2 else None
    score = clusters.density_peak_score(want, near, valid, boost=boost)
    parts = (t if t is None else t.to(DEVICE) for t in (want, near, valid, boost))
    made = clusters_cuda.density_peak_score(*parts, int(near.max())).cpu()
    assert torch.allclose(made, score, atol=1e-6)
    assert torch.equal(made == -torch.inf, ~valid)

    centre = torch.zeros_like(valid).scatter_(1, score.topk(min(2, n)).indices, True) & valid
    owner = clusters_cuda.assign(want.to(DEVICE), centre.to(DEVICE)).cpu()
    assert torch.equal(owner, clusters.assign(want, centre))

    times = torch.randint(1, 4, (b, n)) * valid
    for rule in ("beta", "mean"):
        weight = clusters.weights(owner, times, rule, 0.6)
        given = clusters_cuda.weights(owner.to(DEVICE), times.to(DEVICE), rule == "mean", 0.6).cpu()
        assert torch.allclose(given[valid], weight[valid], atol=1e-6)


def test_of_equally_near_centres_the_first_owns() -> None:
    distance, centre = torch.ones(1, 5, 5), torch.tensor([[False, True, False, True, False]])
    owner = clusters_cuda.assign(distance.to(DEVICE), centre.to(DEVICE)).cpu()
    assert owner.tolist() == clusters.assign(distance, centre).tolist() == [[1, 1, 1, 3, 1]]


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 7, 196, 1000, clusters_cuda.LARGEST])
def test_a_gpu_takes_its_kernels_and_says_what_a_cpu_says(n: int) -> None:
    x, size, valid = groups(n, 3, n)
    assert clusters.kernels_for(x.cuda()) is clusters_cuda
    want, got = similarity.distances(x), similarity.distances(x.cuda())
    assert torch.allclose(got.cpu(), want, atol=1e-3)
    near = size.clamp_max(7)
    score = clusters.density_peak_score(want, near, valid)
    made = clusters.density_peak_score(want.cuda(), near.cuda(), valid.cuda(), most=7)
    assert torch.allclose(made.cpu(), score, atol=1e-5)
    centre = torch.zeros_like(valid)
    centre[:, 0] = True
    owner = clusters.assign(want.cuda(), centre.cuda()).cpu()
    assert torch.equal(owner, clusters.assign(want, centre))
