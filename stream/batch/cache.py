"""Reduced tokens on disk, named by what was encoded and how: bytes of the video, config, device."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from stream.data import Budget, PatchGrid, Segment
from stream.errors import SourceError
from stream.pipeline import ReducedVideo
from stream.plan import Plan

FORMAT = 1
STALE_S = 3600.0
"""A temporary file as old as this was left by a writer that was killed."""


def content_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes, or of the names and bytes in a folder; read as a stream."""
    path = Path(path)
    if path.is_dir():
        whole = hashlib.sha256()
        for inside in sorted(p for p in path.iterdir() if p.is_file()):
            whole.update(os.fsencode(f"{inside.name}\0{content_hash(inside)}\n"))
        return whole.hexdigest()
    if not path.is_file():
        raise SourceError(
            f"{path} is no file or folder; a pipe can be read only once. Save it to a file first."
        )
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TokenCache:
    """A folder of safetensors files that any number of processes may share.

    limit_bytes: when the files together exceed it, the longest unused ones go.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes

    @staticmethod
    def key(content: str, config: str, device_type: str) -> str:
        """Features differ between device types, by rounding and number format."""
        return hashlib.sha256(f"{FORMAT}/{content}/{config}/{device_type}".encode()).hexdigest()

    def get(self, key: str, device: torch.device) -> tuple[ReducedVideo, dict[str, Any]] | None:
        """(tokens, what was stored beside them); None when absent. A damaged file is removed."""
        path = self._path(key)
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                about = json.loads(file.metadata()["foveate"])
            video = _unpacked(tensors, about["video"], device)
            os.utime(path)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            _remove(path)
            return None
        return video, about["extra"]

    def put(self, key: str, video: ReducedVideo, extra: dict[str, Any]) -> bool:
        """Store whole or not at all; False when the disk refused."""
        tensors, about = _packed(video)
        metadata = {"foveate": json.dumps({"video": about, "extra": extra})}
        temporary = self._folder / f"{uuid.uuid4().hex}.tmp"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(save(tensors, metadata))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path(key))
            self._evict()
        except OSError:
            _remove(temporary)
            return False
        return True

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"

    def _evict(self) -> None:
        files = []
        for entry in os.scandir(self._folder):
            try:
                stat = entry.stat()
            except FileNotFoundError:
                continue
            if entry.name.endswith(".safetensors"):
                files.append((stat.st_mtime_ns, stat.st_size, entry.path))
            elif entry.name.endswith(".tmp") and time.time() - stat.st_mtime > STALE_S:
                _remove(Path(entry.path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._limit_bytes:
                break
            _remove(Path(path))
            total -= size


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _packed(video: ReducedVideo) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    plan = video.plan.to("cpu")
    tensors = {"x": video.x.cpu(), "anchor": plan.anchor}
    if plan.row is not None and plan.col is not None and plan.weight is not None:
        tensors |= {"row": plan.row, "col": plan.col, "weight": plan.weight}
    about = {
        "n": plan.n,
        "grid": asdict(video.grid),
        "pts_s": list(video.pts_s),
        "budget": asdict(video.budget),
        "segments": [[s.start, s.stop] for s in video.segments],
    }
    return {name: t.contiguous() for name, t in tensors.items()}, about


def _unpacked(
    tensors: dict[str, torch.Tensor], about: dict[str, Any], device: torch.device
) -> ReducedVideo:
    entries = (tensors.get(name) for name in ("row", "col", "weight"))
    return ReducedVideo(
        tensors["x"].to(device),
        Plan(tensors["anchor"], about["n"], *entries).to(device),
        PatchGrid(**about["grid"]),
        tuple(about["pts_s"]),
        Budget(**about["budget"]),
        tuple(Segment(start, stop) for start, stop in about["segments"]),
    )
