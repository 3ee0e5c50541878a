"""Cached tokens come back bit for bit, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from stream.batch.cache import STALE_S, TokenCache, content_hash
from stream.data import Budget, PatchGrid, Segment
from stream.errors import SourceError
from stream.pipeline import ReducedVideo
from stream.plan import Plan

CPU = torch.device("cpu")
EXTRA = {"frames": 2, "note": "cut short"}


def reduced(merge: bool = True, dtype: torch.dtype = torch.float32) -> ReducedVideo:
    plan = Plan.keep(torch.tensor([1, 5]), 8)
    if merge:
        row, col = torch.tensor([1, 0, 0]), torch.tensor([5, 1, 2])
        plan = Plan.merge(plan.anchor, row, col, torch.tensor([1.0, 0.6, 0.4]), 8)
    x = plan.apply(torch.randn(8, 16)).to(dtype)
    segments = (Segment(0, 1), Segment(1, 2))
    return ReducedVideo(x, plan, PatchGrid(2, 2, 2), (0.1, 1 / 3), Budget(2), segments)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path: Path, merge: bool, dtype: torch.dtype) -> None:
    cache = TokenCache(tmp_path / "new", 1 << 20)
    video = reduced(merge, dtype)
    assert cache.get("k", CPU) is None
    assert cache.put("k", video, EXTRA)
    found = cache.get("k", CPU)
    assert found is not None
    back, extra = found
    assert torch.equal(back.x, video.x)
    assert back.x.dtype == dtype
    assert back.plan.is_gather is not merge
    assert back.plan.same_as(video.plan)
    assert (back.grid, back.pts_s, back.budget) == (video.grid, video.pts_s, video.budget)
    assert back.segments == video.segments
    assert extra == EXTRA
    assert [p.suffix for p in (tmp_path / "new").iterdir()] == [".safetensors"]


def test_the_longest_unused_go_first(tmp_path: Path) -> None:
    probe = TokenCache(tmp_path, 1 << 30)
    probe.put("0", reduced(), EXTRA)
    size = (tmp_path / "0.safetensors").stat().st_size
    cache = TokenCache(tmp_path, 3 * size)
    for name in "12":
        cache.put(name, reduced(), EXTRA)
    for age_s, name in enumerate("210"):
        os.utime(tmp_path / f"{name}.safetensors", (0, 1000 + age_s))
    assert cache.get("2", CPU) is not None
    cache.put("3", reduced(), EXTRA)
    assert {p.stem for p in tmp_path.iterdir()} == {"0", "2", "3"}
    TokenCache(tmp_path, 0).put("4", reduced(), EXTRA)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_a_damaged_file_is_a_miss_and_goes(tmp_path: Path, keep: int) -> None:
    cache = TokenCache(tmp_path, 1 << 20)
    cache.put("k", reduced(), EXTRA)
    path = tmp_path / "k.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert cache.get("k", CPU) is None
    assert not path.exists()
    assert cache.put("k", reduced(), EXTRA)


def test_what_a_killed_writer_left_goes_in_time(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path, 1 << 20)
    old, fresh = tmp_path / "old.tmp", tmp_path / "fresh.tmp"
    for path in (old, fresh):
        path.write_bytes(b"half")
    long_ago = fresh.stat().st_mtime - STALE_S - 1
    os.utime(old, (long_ago, long_ago))
    cache.put("k", reduced(), EXTRA)
    assert not old.exists()
    assert fresh.exists()


def test_a_disk_that_refuses_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert not TokenCache(tmp_path / "file" / "below", 1).put("k", reduced(), EXTRA)


def test_content_is_bytes_and_nothing_else(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"x" * 100)
    other.write_bytes(b"x" * 100)
    os.utime(other, (0, 0))
    assert content_hash(one) == content_hash(other)
    before = one.stat()
    one.write_bytes(b"x" * 99 + b"y")
    os.utime(one, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert content_hash(one) != content_hash(other)
    assert content_hash(tmp_path) != content_hash(one)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="pipe"):
        content_hash(tmp_path / "pipe")


def test_keys_tell_apart_content_config_and_device() -> None:
    keys = {TokenCache.key(*k) for k in [("a", "b", "cpu"), ("a", "c", "cpu"), ("a", "b", "cuda")]}
    assert len(keys) == 3
