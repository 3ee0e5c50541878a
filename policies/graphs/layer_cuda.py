"""What a decoder layer does between its matrix products, as one kernel each; float32 inside.

Inputs may be parts of wider rows, as joined products leave them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_HEADS = 8


@triton.jit  # type: ignore[untyped-decorator]
def _rotate(  # type: ignore[no-untyped-def]
    query,
    key,
    cos,
    sin,
    out_query,
    out_key,
    heads,
    key_heads,
    half,
    query_stride,
    key_stride,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    query_blocks = tl.cdiv(heads, HEADS)
    if block < query_blocks:
        source, target = query + token * query_stride, out_query + token * heads * 2 * half
        count = heads
    else:
        source, target = key + token * key_stride, out_key + token * key_heads * 2 * half
        block -= query_blocks
        count = key_heads
    head = (block * HEADS + tl.arange(0, HEADS))[:, None]
    channel = tl.arange(0, HALF)[None, :]
    exists = (head < count) & (channel < half)
    first, second = head * 2 * half + channel, head * 2 * half + half + channel
    table, known = token * 2 * half + channel, channel < half
    x = tl.load(source + first, mask=exists).to(tl.float32)
    y = tl.load(source + second, mask=exists).to(tl.float32)
    c = tl.load(cos + table, mask=known).to(tl.float32)
    s = tl.load(sin + table, mask=known).to(tl.float32)
    tl.store(target + first, x * c - y * s, mask=exists)
    c = tl.load(cos + table + half, mask=known).to(tl.float32)
    s = tl.load(sin + table + half, mask=known).to(tl.float32)
    tl.store(target + second, y * c + x * s, mask=exists)


@triton.jit  # type: ignore[untyped-decorator]
def _gate(  # type: ignore[no-untyped-def]
    gate, up, out, size, gate_stride, up_stride, TANH_GELU: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = at < size
    g = tl.load(gate + row * gate_stride + at, mask=exists).to(tl.float32)
    u = tl.load(up + row * up_stride + at, mask=exists).to(tl.float32)
    inside = g * (1.5957691216057308 + 0.07135481627260025 * g * g) if TANH_GELU else g
    tl.store(out + row * size + at, g / (1.0 + tl.exp(-inside)) * u, mask=exists)


@triton.jit  # type: ignore[untyped-decorator]
def _add_norm(x, more, weight, total, normed, size, eps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * size
    at = tl.arange(0, BLOCK)
    exists = at < size
    a = tl.load(x + row + at, mask=exists, other=0.0).to(tl.float32)
    b = tl.load(more + row + at, mask=exists, other=0.0).to(tl.float32)
    rounded = (a + b).to(total.dtype.element_ty)
    tl.store(total + row + at, rounded, mask=exists)
    s = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(s * s) / size + eps)
    w = tl.load(weight + at, mask=exists).to(tl.float32)
    tl.store(normed + row + at, s * scale * w, mask=exists)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As `layer.rotate`."""
    b, n, heads, d = query.shape
    query, key = _by_rows(query), _by_rows(key)
    cos, sin = cos.expand(b, n, d).contiguous(), sin.expand(b, n, d).contiguous()
    out_query, out_key = query.new_empty(query.shape), key.new_empty(key.shape)
    key_heads, half = key.shape[2], d // 2
    with torch.cuda.device_of(query):
        _rotate[(b * n, triton.cdiv(heads, _HEADS) + triton.cdiv(key_heads, _HEADS))](
            query,
            key,
            cos,
            sin,
            out_query,
            out_key,
            heads,
            key_heads,
            half,
            query.stride(1),
            key.stride(1),
            _HEADS,
            triton.next_power_of_2(half),
            num_warps=2,
        )
    return out_query, out_key


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both [b, n, d]."""
    return _gated(gate, up, False)


def tanh_gelu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, the tanh approximation of it: x times the sigmoid of twice what the tanh is
    of. Both [b, n, d]."""
    return _gated(gate, up, True)


def _gated(gate: Tensor, up: Tensor, tanh_gelu: bool) -> Tensor:
    gate, up = _by_rows(gate), _by_rows(up)
    out = gate.new_empty(gate.shape)
    b, n, size = gate.shape
    with torch.cuda.device_of(gate):
        _gate[(b * n, triton.cdiv(size, _BLOCK))](
            gate, up, out, size, gate.stride(1), up.stride(1), tanh_gelu, _BLOCK
        )
    return out


def add_norm(x: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `layer.add_norm`."""
    x, more = x.contiguous(), more.contiguous()
    total, normed = torch.empty_like(x), torch.empty_like(x)
    size = x.shape[-1]
    block = triton.next_power_of_2(size)
    with torch.cuda.device_of(x):
        _add_norm[(x.numel() // size,)](
            x, more, weight, total, normed, size, eps, block, num_warps=warps_of(block)
        )
    return total, normed


def warps_of(block: int) -> int:
    """For a program that reads a row of so many values."""
    return min(max(block // 512, 1), 8)


def _by_rows(x: Tensor) -> Tensor:
    """x [b, n, ...] such that row i of the b * n begins i * x.stride(1) behind the first and is
    dense in itself."""
    even = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return x if even and x[0, 0].is_contiguous() else x.contiguous()
