"""What `lean` does between matrix products, as one kernel each; float32 inside."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..graphs.layer_cuda import warps_of

_LOWEST = torch.finfo(torch.float32).min


@triton.jit  # type: ignore[untyped-decorator]
def _masked_softmax(  # type: ignore[no-untyped-def]
    logits,
    mask,
    out,
    rows,
    m,
    held,
    groups,
    scaling,
    lowest,
    batch_stride,
    row_stride,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1)
    at = tl.arange(0, BLOCK)
    exists = at < m
    start = (head.to(tl.int64) * rows + row) * m
    x = tl.load(logits + start + at, mask=exists, other=0.0).to(tl.float32) * scaling
    own = mask + (head // held).to(tl.int64) * batch_stride + (row // groups) * row_stride
    if ADDS:
        x += tl.load(own + at, mask=exists, other=0.0).to(tl.float32)
    else:
        x = tl.where(tl.load(own + at, mask=exists, other=0) != 0, x, lowest)
    x = tl.where(exists, x, float("-inf"))
    x = tl.exp(x - tl.max(x))
    tl.store(out + start + at, x / tl.sum(x), mask=exists)


@triton.jit  # type: ignore[untyped-decorator]
def _norm(  # type: ignore[no-untyped-def]
    x,
    scale,
    shift,
    out,
    size,
    n,
    scale_stride,
    shift_stride,
    one,
    eps,
    SHIFTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    exists = at < size
    s = tl.load(x + row * size + at, mask=exists, other=0.0).to(tl.float32)
    s *= 1.0 / tl.sqrt(tl.sum(s * s) / size + eps)
    sequence = row // n
    s *= one + tl.load(scale + sequence * scale_stride + at, mask=exists).to(tl.float32)
    if SHIFTS:
        s += tl.load(shift + sequence * shift_stride + at, mask=exists).to(tl.float32)
    tl.store(out + row * size + at, s, mask=exists)


@triton.jit  # type: ignore[untyped-decorator]
def _rope(x, positions, timescale, out, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    channel = tl.arange(0, HALF)[None, :]
    exists = (head < heads) & (channel < half)
    start = token * heads * 2 * half
    position = tl.load(positions + token).to(tl.float32)
    radians = position / tl.load(timescale + channel, mask=channel < half, other=1.0)
    sin, cos = tl.sin(radians), tl.cos(radians)
    first = start + head * 2 * half + channel
    a = tl.load(x + first, mask=exists).to(tl.float32)
    b = tl.load(x + first + half, mask=exists).to(tl.float32)
    tl.store(out + first, a * cos - b * sin, mask=exists)
    tl.store(out + first + half, b * cos + a * sin, mask=exists)


def masked_softmax(logits: Tensor, mask: Tensor, scaling: float, groups: int) -> Tensor:
    """As `lean.masked_softmax`."""
    logits = logits.contiguous()
    mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    b, held, rows, m = logits.shape
    mask = mask.expand(b, 1, rows // groups, m)
    adds = mask.dtype != torch.bool
    out = torch.empty_like(logits)
    block = triton.next_power_of_2(m)
    with torch.cuda.device_of(logits):
        _masked_softmax[(rows, b * held)](
            logits,
            mask if adds else mask.view(torch.uint8),
            out,
            rows,
            m,
            held,
            groups,
            scaling,
            _LOWEST,
            mask.stride(0),
            mask.stride(2),
            adds,
            block,
            num_warps=warps_of(block),
        )
    return out


def norm(
    x: Tensor, scale: Tensor, shift: Tensor | None, one: float, eps: float, kind: torch.dtype
) -> Tensor:
    """As `lean.norm`."""
    x, scale = x.contiguous(), _dense(scale)
    shift = None if shift is None else _dense(shift)
    n, size = x.shape[-2:]
    out = torch.empty(x.shape, dtype=kind, device=x.device)
    block = triton.next_power_of_2(size)
    with torch.cuda.device_of(x):
        _norm[(x.numel() // size,)](
            x,
            scale,
            scale if shift is None else shift,
            out,
            size,
            n,
            _stride(scale),
            0 if shift is None else _stride(shift),
            one,
            eps,
            shift is not None,
            block,
            num_warps=warps_of(block),
        )
    return out


def rope(x: Tensor, positions: Tensor, timescale: Tensor) -> Tensor:
    """As `lean.rope`."""
    b, n, heads, d = x.shape
    x, positions = x.contiguous(), positions.expand(b, n).contiguous()
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _rope[(b * n,)](
            x,
            positions,
            timescale,
            out,
            heads,
            d // 2,
            triton.next_power_of_2(heads),
            triton.next_power_of_2(d // 2),
            num_warps=2,
        )
    return out


def _dense(values: Tensor) -> Tensor:
    return values if values.stride(-1) == 1 else values.contiguous()


def _stride(values: Tensor) -> int:
    """From one sequence to the next; 0 where all share them."""
    return values.stride(0) if values.ndim == 2 and len(values) > 1 else 0
