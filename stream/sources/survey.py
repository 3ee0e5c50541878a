"""What a set of inputs gives, one row each, and what reading one costs in memory."""

from __future__ import annotations

import os
import resource
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from stream.errors import SourceError

from .base import IMAGE_SUFFIXES, Decoder, is_dataset, open_source, reason_of, without_credentials
from .sampling import Sampling, Uniform


def survey(
    paths: Iterable[str | os.PathLike[str]],
    sampling: Sampling | None = None,
    decoder: Decoder = "pyav",
    timeout_s: float = 5.0,
) -> list[dict[str, Any]]:
    """Read each input with `sampling` (32 uniform frames) and say what came of it. Never raises.

    One row: path, kind, result (ok, partial or error), frames (given), decoded, failed (packets),
    said, seconds. Keyframe intervals that hold no wanted frame may be jumped over and are then not
    checked; `Fps(1000)` checks every frame.
    """
    return [_row(os.fspath(path), sampling or Uniform(32), decoder, timeout_s) for path in paths]


class MemoryPoint(NamedTuple):
    """media_s: presentation time since the first frame given. rss_mib: resident memory, MiB."""

    media_s: float
    rss_mib: float


def memory_trace(path: str | os.PathLike[str], sampling: Sampling) -> Iterator[MemoryPoint]:
    """Resident memory of this process at each sampled frame; frames are let go at once."""
    with open_source(path) as source:
        first_s: float | None = None
        for frame in source.read(sampling):
            first_s = frame.pts_s if first_s is None else first_s
            media_s = frame.pts_s - first_s
            del frame
            yield MemoryPoint(media_s, rss_mib())


def rss_mib() -> float:
    """Resident memory of this process now; its peak where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _row(path: str, sampling: Sampling, decoder: Decoder, timeout_s: float) -> dict[str, Any]:
    began_s = time.perf_counter()
    result, given, decoded, failed, said = "error", 0, 0, 0, ""
    source = None
    try:
        with open_source(path, decoder, timeout_s=timeout_s) as source:
            for _ in source.read(sampling):
                given += 1
        result, said = ("ok" if source.report.complete else "partial"), source.report.said
    except SourceError as error:
        said = str(error)
    except Exception as error:
        said = f"unexpected {type(error).__name__}: {reason_of(error)}"
    if source is not None:
        decoded, failed = source.report.frames_decoded, source.report.packets_failed
    return {
        "path": without_credentials(path),
        "kind": _kind(path),
        "result": result,
        "frames": given,
        "decoded": decoded,
        "failed": failed,
        "said": said,
        "seconds": round(time.perf_counter() - began_s, 3),
    }


def _kind(path: str) -> str:
    if is_dataset(path):
        return "dataset"
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return "nothing"
    if stat.S_ISREG(mode):
        return "image" if path.lower().endswith(IMAGE_SUFFIXES) else "file"
    return "folder" if stat.S_ISDIR(mode) else "pipe" if stat.S_ISFIFO(mode) else "device"
