"""The sum between two branches of a vision layer and the norm that reads it, as one kernel; float32
inside."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layer_cuda import warps_of


@triton.jit  # type: ignore[untyped-decorator]
def _add_norm(  # type: ignore[no-untyped-def]
    x,
    more,
    scale,
    weight,
    bias,
    total,
    normed,
    size,
    eps,
    ADDS: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * size
    at = tl.arange(0, BLOCK)
    exists = at < size
    s = tl.load(x + row + at, mask=exists, other=0.0).to(tl.float32)
    if ADDS:
        b = tl.load(more + row + at, mask=exists, other=0.0).to(tl.float32)
        if SCALES:
            b *= tl.load(scale + at, mask=exists, other=0.0).to(tl.float32)
        rounded = (s + b).to(total.dtype.element_ty)
        tl.store(total + row + at, rounded, mask=exists)
        s = rounded.to(tl.float32)
    apart = tl.where(exists, s - tl.sum(s) / size, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(apart * apart) / size + eps)
    w = tl.load(weight + at, mask=exists).to(tl.float32)
    b = tl.load(bias + at, mask=exists).to(tl.float32)
    tl.store(normed + row + at, apart * inverse * w + b, mask=exists)


def add_norm(
    x: Tensor, more: Tensor | None, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(x + more * scale, its norm times weight plus bias): x, more [..., d]; the others [d].

    Without more the sum is x itself.
    """
    x = x.contiguous()
    more = None if more is None else more.contiguous()
    total = x if more is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    size = x.shape[-1]
    block = triton.next_power_of_2(size)
    with torch.cuda.device_of(x):
        _add_norm[(x.numel() // size,)](
            x,
            x if more is None else more,
            weight if scale is None else scale,
            weight,
            bias,
            total,
            normed,
            size,
            eps,
            more is not None,
            scale is not None,
            block,
            num_warps=warps_of(block),
        )
    return total, normed
