"""What a decoder layer does between its matrix products, as one kernel each; float32 inside."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _rotate(  # type: ignore[no-untyped-def]
    query, key, cos, sin, out_query, out_key, heads, key_heads, half, HALF: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    channel = tl.arange(0, HALF)
    exists = channel < half
    if head < heads:
        source, target, row = query, out_query, token * heads + head
    else:
        source, target, row = key, out_key, token * key_heads + head - heads
    first, second = row * 2 * half + channel, row * 2 * half + half + channel
    table = token * 2 * half + channel
    x = tl.load(source + first, mask=exists).to(tl.float32)
    y = tl.load(source + second, mask=exists).to(tl.float32)
    c = tl.load(cos + table, mask=exists).to(tl.float32)
    s = tl.load(sin + table, mask=exists).to(tl.float32)
    tl.store(target + first, x * c - y * s, mask=exists)
    c = tl.load(cos + table + half, mask=exists).to(tl.float32)
    s = tl.load(sin + table + half, mask=exists).to(tl.float32)
    tl.store(target + second, y * c + x * s, mask=exists)


@triton.jit  # type: ignore[untyped-decorator]
def _silu_gate(gate, up, out, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = at < size
    g = tl.load(gate + at, mask=exists).to(tl.float32)
    u = tl.load(up + at, mask=exists).to(tl.float32)
    tl.store(out + at, g / (1.0 + tl.exp(-g)) * u, mask=exists)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As `layer.rotate`."""
    b, n, heads, d = query.shape
    query, key = query.contiguous(), key.contiguous()
    cos, sin = cos.expand(b, n, d).contiguous(), sin.expand(b, n, d).contiguous()
    out_query, out_key = torch.empty_like(query), torch.empty_like(key)
    key_heads, half = key.shape[2], d // 2
    with torch.cuda.device_of(query):
        _rotate[(b * n, heads + key_heads)](
            query,
            key,
            cos,
            sin,
            out_query,
            out_key,
            heads,
            key_heads,
            half,
            triton.next_power_of_2(half),
            num_warps=1,
        )
    return out_query, out_key


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of equal shapes."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    with torch.cuda.device_of(gate):
        _silu_gate[(triton.cdiv(out.numel(), _BLOCK),)](gate, up, out, out.numel(), _BLOCK)
    return out
