"""The kernel that compares frames: on a GPU, or interpreted where there is none."""

from __future__ import annotations

import pytest
import torch

from stream.ops import similarity

pytest.importorskip("triton")
from stream.ops import similarity_cuda

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning:triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 30, similarity_cuda.BLOCK + 7])
def test_the_kernel_says_what_the_operators_say(channels: int, dtype: torch.dtype) -> None:
    x = torch.randn(4, 3, channels, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[2, 1] = 0.0
    got = similarity_cuda.adjacent_cosine(x.to(DEVICE)).cpu()
    assert got.dtype == torch.float32
    assert torch.allclose(got, similarity.adjacent_cosine(x), atol=1e-6)
    assert got[1:, 1].tolist() == [0.0, 0.0]


@pytest.mark.gpu
def test_a_gpu_takes_the_kernel() -> None:
    x = torch.randn(3, 5, 64).cuda()
    assert similarity._kernels_for(x) is similarity_cuda
    assert similarity.adjacent_cosine(x[:1]).shape == (0, 5)
    want = similarity.adjacent_cosine(x.cpu())
    assert torch.allclose(similarity.adjacent_cosine(x).cpu(), want, atol=1e-6)
