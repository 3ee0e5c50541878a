"""Received attention without the map: on a GPU, or interpreted where there is none."""

from __future__ import annotations

import pytest
import torch

from policies.probes import Attention

pytest.importorskip("triton")
from policies import received_cuda

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("heads", [(1, 1), (4, 2)])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 4), (5, 70, 24), (130, 65, 72)])
def test_a_key_receives_what_the_map_would_say(
    n: int, m: int, d: int, heads: tuple[int, int]
) -> None:
    """Of queries and keys whose heads lie side by side."""
    draw = torch.Generator().manual_seed(n)
    query, key = (
        (3 * torch.randn(2, rows, h, d, generator=draw)).transpose(1, 2)
        for rows, h in zip((n, m), heads, strict=True)
    )
    want = Attention(query, key, 0.3, None, causal=False).received_from_all()
    got = received_cuda.received_from_all(query.to(DEVICE), key.to(DEVICE), 0.3)
    assert torch.allclose(got.cpu(), want, atol=1e-6, rtol=1e-4)
    assert torch.allclose(got.sum(1).cpu(), torch.ones(2), atol=1e-5)


@pytest.mark.parametrize(
    ("row_bytes", "kib", "rows"),
    [
        (512, 227, 64),
        (512, 96, 32),
        (512, 64, 32),
        (256, 64, 64),
        (1024, 99, 32),
        (1024, 64, 16),
        (4096, 48, 16),
    ],
)
def test_tiles_fit_the_shared_memory_of_smaller_gpus(row_bytes: int, kib: int, rows: int) -> None:
    assert received_cuda.rows_within(row_bytes, kib * 1024) == rows


@pytest.mark.parametrize("kib", [0, 20])
def test_smaller_tiles_say_the_same(kib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.randn(2, 1, 2, 70, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    want = received_cuda.received_from_all(query, key, 0.3)
    monkeypatch.setattr(received_cuda, "_room", lambda device: kib * 1024)
    got = received_cuda.received_from_all(query, key, 0.3)
    assert torch.allclose(got, want, atol=1e-6, rtol=1e-4)


@pytest.mark.gpu
def test_a_gpu_rounds_no_logit_of_bfloat16() -> None:
    query, key = (2 * torch.randn(2, 2, 3, 300, 72)).bfloat16()
    exact = Attention(query.float(), key.float(), 0.2, None, causal=False).received_from_all()
    on_gpu = Attention(query.cuda(), key.cuda(), 0.2, None, causal=False).received_from_all()
    assert torch.allclose(on_gpu.cpu(), exact, atol=1e-6, rtol=1e-4)
