"""What a run has finished, safe against a kill at any moment.

Each start of a run opens a shard of its own and only appends to it; a line counts once its newline
is on disk. A line cut off by a kill is the last of its shard and is left out when read.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Self

from .jobs import Outcome


class Journal:
    """The shards of one run. Use it in a `with` block to append."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shard = -1

    def read(self) -> dict[str, Outcome]:
        """What is finished, by key; the latest where a job was done again."""
        done: dict[str, Outcome] = {}
        for shard in sorted(self._folder.glob("*.jsonl")):
            for line in shard.read_bytes().splitlines(keepends=True):
                if outcome := _outcome(line):
                    done[outcome.key] = outcome
        return done

    def append(self, outcome: Outcome) -> None:
        """Return once the outcome is on disk."""
        line = memoryview((json.dumps(outcome.to_record()) + "\n").encode())
        while line:
            line = line[os.write(self._shard, line) :]
        os.fsync(self._shard)

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(p.stem) for p in self._folder.glob("*.jsonl")), default=0)
        name = self._folder / f"{number:06d}.jsonl"
        self._shard = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o644)
        sync_folder(self._folder)
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._shard)


def _outcome(line: bytes) -> Outcome | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record: Any = json.loads(line)
        return Outcome.from_record(record)
    except (ValueError, TypeError, KeyError):
        return None


def write_whole(path: Path, text: str) -> None:
    """Replace a file: a reader sees the old one or the new one, also after a power cut."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make new names in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
