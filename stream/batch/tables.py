"""Records of JSONL, JSON, CSV and Parquet files, one after the other, the bad ones marked."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stream.errors import SourceError

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A record that cannot be had, and why."""

    reason: str


def records(path: Path) -> Iterator[Record | Unreadable]:
    """Every record of a file in order; SourceError when the file as a whole cannot be read."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise SourceError(
            f"{path} is no manifest by its name; it must end in {', '.join(sorted(READERS))}."
        )
    try:
        yield from reader(path)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}.") from error


def _jsonl(path: Path) -> Iterator[Record | Unreadable]:
    empty = 0
    with path.open("rb") as file:
        for number, line in enumerate(file):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
            if not line.strip():
                empty += 1
                continue
            for _ in range(empty):
                yield Unreadable("the line is empty")
            empty = 0
            yield _json_record(line)


def _json_record(line: bytes) -> Record | Unreadable:
    try:
        return _as_record(json.loads(line.decode()))
    except UnicodeDecodeError as error:
        return Unreadable(f"not UTF-8 text at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        return Unreadable(f"not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return Unreadable(f"not JSON: {error}")


def _json(path: Path) -> Iterator[Record | Unreadable]:
    try:
        data = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not JSON: {error}.") from error
    if not isinstance(data, list):
        raise SourceError(
            f"{path} holds one {type(data).__name__}; a list of objects is needed. "
            "A file with one object a line must end in .jsonl."
        )
    yield from map(_as_record, data)


def _csv(path: Path) -> Iterator[Record | Unreadable]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            names = next(reader)
        except (StopIteration, csv.Error) as error:
            raise SourceError(f"{path} has no line with column names.") from error
        if len(set(names)) < len(names):
            raise SourceError(f"{path} names a column twice: {', '.join(names)}.")
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Unreadable(f"not CSV: {error}")
                continue
            if len(cells) == len(names):
                yield dict(zip(names, cells, strict=True))
            elif cells:
                yield Unreadable(f"{len(cells)} cells for {len(names)} columns")
            else:
                yield Unreadable("the line is empty")


def _parquet(path: Path) -> Iterator[Record | Unreadable]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise SourceError(f"{path} is no readable Parquet file: {error}.") from error


def _as_record(value: Any) -> Record | Unreadable:
    if isinstance(value, dict):
        return value
    return Unreadable(f"a {type(value).__name__}, not an object with named fields")


READERS: dict[str, Callable[[Path], Iterator[Record | Unreadable]]] = {
    ".csv": _csv,
    ".json": _json,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
