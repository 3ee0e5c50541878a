"""The attention that keys receive, without the attention map: logits are made twice, kept never.

Products are of the type of queries and keys and summed in float32, so nothing is rounded that
float32 products would not round.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _FEWEST = 64, 16


@triton.jit
def _tile(source, at, count, channel, size, stride):  # type: ignore[no-untyped-def]
    """Rows `at` of [count, size], zero where there is none."""
    exists = (at < count)[:, None] & (channel < size)[None, :]
    return tl.load(source + at[:, None] * stride + channel[None, :], mask=exists, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _spread(  # type: ignore[no-untyped-def]
    query,
    key,
    level,
    scale,
    heads,
    groups,
    n,
    m,
    size,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """level [b, h, n]: the binary logarithm of what the exponentials of a row's logits sum to."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    both = tl.program_id(1).to(tl.int64)
    batch, head = both // heads, both % heads
    channel = tl.arange(0, SIZE)
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head // groups * key_head
    q = _tile(query, row, n, channel, size, query_row)
    highest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, m, ROWS):
        column = first + tl.arange(0, ROWS)
        k = _tile(key, column, m, channel, size, key_row)
        logit = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        logit = tl.where((column < m)[None, :], logit, -float("inf"))
        new = tl.maximum(highest, tl.max(logit, 1))
        total = total * tl.exp2(highest - new) + tl.sum(tl.exp2(logit - new[:, None]), 1)
        highest = new
    tl.store(level + both * n + row, highest + tl.log2(total), mask=row < n)


@triton.jit  # type: ignore[untyped-decorator]
def _collect(  # type: ignore[no-untyped-def]
    query,
    key,
    level,
    received,
    scale,
    heads,
    groups,
    n,
    m,
    size,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """received [b, h, m]: the weight of each key, summed over the rows."""
    column = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    both = tl.program_id(1).to(tl.int64)
    batch, head = both // heads, both % heads
    channel = tl.arange(0, SIZE)
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head // groups * key_head
    k = tl.trans(_tile(key, column, m, channel, size, key_row))
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, n, ROWS):
        row = first + tl.arange(0, ROWS)
        q = _tile(query, row, n, channel, size, query_row)
        logit = tl.dot(q, k, input_precision="ieee") * scale
        sums = tl.load(level + both * n + row, mask=row < n, other=float("inf"))
        total += tl.sum(tl.exp2(logit - sums[:, None]), 0)
    tl.store(received + both * m + column, total, mask=column < m)


def received_from_all(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Attention each key receives, mean over heads and queries, float32 [b, m].

    query: [b, h, n, d]; key: [b, h_kv, m, d]; all queries see all keys.
    """
    query, key = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key))
    b, h, n, d = query.shape
    m = key.shape[2]
    level, received = (query.new_empty(b, h, x, dtype=torch.float32) for x in (n, m))
    shape = (scaling * math.log2(math.e), h, h // key.shape[1], n, m, d)
    strides = (*query.stride()[:3], *key.stride()[:3])
    size = max(16, triton.next_power_of_2(d))
    rows = rows_within(size * query.element_size(), _room(query.device))
    with torch.cuda.device_of(query):
        _spread[(triton.cdiv(n, rows), b * h)](query, key, level, *shape, *strides, rows, size)
        _collect[(triton.cdiv(m, rows), b * h)](
            query, key, level, received, *shape, *strides, rows, size
        )
    return received.mean(1) / n


def rows_within(row_bytes: int, room: float) -> int:
    """Rows of a tile such that three of them, one that stays and two on their way, and a little
    more fit into `room` bytes, as far as the fewest do."""
    rows = _ROWS
    while rows > _FEWEST and 3 * rows * row_bytes + 2048 > room:
        rows //= 2
    return rows


def _room(device: torch.device) -> float:
    """Bytes of shared memory that a kernel may have."""
    if device.type != "cuda":
        return math.inf
    properties = torch.cuda.get_device_properties(device)
    return float(getattr(properties, "shared_memory_per_block_optin", 2**16))
