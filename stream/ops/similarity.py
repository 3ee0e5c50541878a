"""How alike tokens are."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .built import built
from .clusters import kernels_for


def adjacent_cosine(x: Tensor) -> Tensor:
    """Cosine of each patch with the same patch one frame later, float32 [t-1, p].

    x: [t, p, c]. Zero vectors have similarity 0, as torch's cosine_similarity has it. The dot
    products are contracted without an n x c temporary.
    """
    if x[1:].numel() and (kernels := _kernels_for(x)):
        made: Tensor = kernels.adjacent_cosine(x)
        return made
    x = x.float()
    t, p, c = x.shape
    dot = torch.bmm(x[:-1].reshape(-1, 1, c), x[1:].reshape(-1, c, 1)).view(t - 1, p)
    norm = torch.linalg.vector_norm(x, dim=-1).clamp_min(1e-8)
    return dot / (norm[:-1] * norm[1:])


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of every row of a with every row of b: [..., n, c], [..., m, c] -> [..., n, m]."""
    a, b = (v / torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp_min(1e-8) for v in (a, b))
    return a @ b.transpose(-1, -2)


def pairwise_cosine(x: Tensor) -> Tensor:
    """Cosine of every row with every other of its group: [b, n, c] -> float32 [b, n, n]."""
    if not x.is_cuda or x.dtype.itemsize != 2:
        return cosine(x.float(), x.float())
    dot = dots(x)
    norm = dot.diagonal(dim1=1, dim2=2).sqrt().clamp_min(1e-8)
    return dot / (norm[:, :, None] * norm[:, None, :])


def dots(x: Tensor) -> Tensor:
    """Product of every row with every other of its group: [b, n, c] -> float32 [b, n, n].

    A GPU multiplies 16-bit features as they are: each product is exact in float32, in which they
    are summed, so the lengths can be read off the diagonal and nothing of the size of x is made.
    """
    if x.is_cuda and x.dtype.itemsize == 2:
        return torch.bmm(x, x.mT, out_dtype=torch.float32)
    x = x.float()
    return torch.bmm(x, x.mT)


def centred(x: Tensor, sizes: Tensor) -> Tensor:
    """x less each group's mean, float32 [b, n, c]; what is float32 is overwritten.

    x: [b, n, c] of `sizes` (long [b]) points each, the rest zero rows. Distances stay, and the
    matrix-product form becomes accurate for close points.
    """
    mean = x.sum(1, keepdim=True, dtype=torch.float32) / sizes[:, None, None]
    return x.sub_(mean) if x.dtype == torch.float32 else x - mean


def distances(x: Tensor) -> Tensor:
    """Euclidean distances divided by sqrt(c): [b, n, c] -> float32 [b, n, n], diagonal 0."""
    x = x.float()
    if kernels := kernels_for(x):
        made: Tensor = kernels.distances(torch.bmm(x, x.mT), x.shape[-1])
        return made
    square = torch.linalg.vector_norm(x, dim=-1).square()
    d2 = torch.baddbmm(square[:, :, None] + square[:, None, :], x, x.mT, alpha=-2.0)
    d2.diagonal(dim1=-2, dim2=-1).zero_()
    return d2.clamp_min_(0.0).div_(x.shape[-1]).sqrt_()


def _kernels_for(x: Tensor) -> ModuleType | None:
    """`similarity_cuda`, where x is on a GPU that it runs on."""
    return _compiled() if x.is_cuda else None


@cache
def _compiled() -> ModuleType | None:
    """`similarity_cuda`, once it has run."""

    def run() -> ModuleType:
        from . import similarity_cuda

        similarity_cuda.adjacent_cosine(torch.zeros(2, 1, 1, device="cuda"))
        return similarity_cuda

    return built(run, "Frames are compared in several launches")
