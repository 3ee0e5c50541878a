"""A manifest's records become rows: a video, a prompt, an id; what cannot is set aside by number.

A row needs `video` and `question`; `options` (a list, as JSON text in CSV) and `id` may be there.
A `Layout` names other fields, for datasets in the form that lmms-eval's video tasks read.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter, ascii_uppercase
from typing import Any

from pydantic import Field

from stream.config import Config
from stream.errors import ConfigError

from .tables import Record, Unreadable, records


class Layout(Config):
    """Where records keep what a row needs; the defaults are those of a plain manifest.

    task: name at lmms-eval; `{subset}` stands for the manifest's name without its ending.
    root: folder of the videos below $HF_HOME, where lmms-eval puts them.
    video: path below that folder from a record's fields; `{folder}` is that of the subset.
    suffixes: endings to try. folders: subset -> folder.
    question, options, id, target: names of fields. option, prompt: texts of a multiple choice.
    """

    task: str | None = None
    root: str | None = None
    video: str = "{video}"
    suffixes: tuple[str, ...] = ("",)
    folders: dict[str, str] = Field(default_factory=dict)
    question: str = "question"
    options: str = "options"
    id: str = "id"
    target: str = "answer"
    option: str = "{letter}. {text}"
    prompt: str = (
        "{question}\n{options}\nAnswer with the option's letter from the given choices directly."
    )


@dataclass(frozen=True, slots=True)
class Row:
    """One question. row: its number in the manifest, from 1; path: where `video` lies."""

    row: int
    id: str
    video: str
    path: str
    question: str
    options: tuple[str, ...]
    prompt: str
    target: str | None = None


@dataclass(frozen=True, slots=True)
class BadRow:
    """A record that is no row, and why."""

    row: int
    reason: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a file asks for. task: its name at lmms-eval, if it is one of its datasets."""

    rows: tuple[Row, ...]
    bad: tuple[BadRow, ...]
    task: str | None = None

    @property
    def size(self) -> int:
        return len(self.rows) + len(self.bad)


class _BadRow(Exception):
    """Why a record is no row."""


def read_manifest(path: Path, layout: Layout | None = None, videos: Path | None = None) -> Manifest:
    """All rows and all bad rows of a file.

    videos: folder that relative paths start at; default is the manifest's own, or lmms-eval's.
    """
    layout = layout or Layout()
    subset = path.stem
    if layout.folders and subset not in layout.folders:
        raise ConfigError(
            f"{path.name} names no subset of this layout; name the file after one of "
            f"{', '.join(sorted(layout.folders))}."
        )
    base = Path(os.path.abspath(videos or _default_base(path, layout)))
    extra = {"subset": subset, "folder": layout.folders.get(subset, "")}
    rows: list[Row] = []
    bad: list[BadRow] = []
    seen: dict[str, int] = {}
    for number, record in enumerate(records(path), start=1):
        try:
            row = _row(number, record, layout, base, extra)
            if row.id in seen:
                raise _BadRow(f"the id {row.id!r} is also that of row {seen[row.id]}")
        except _BadRow as error:
            bad.append(BadRow(number, str(error)))
        else:
            seen[row.id] = number
            rows.append(row)
    task = layout.task.format(subset=subset) if layout.task else None
    return Manifest(tuple(rows), tuple(bad), task)


def _default_base(path: Path, layout: Layout) -> Path:
    if layout.root is None:
        return path.parent
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    return Path(home).expanduser() / layout.root


def _row(
    number: int,
    record: Record | Unreadable,
    layout: Layout,
    base: Path,
    extra: Mapping[str, str],
) -> Row:
    if isinstance(record, Unreadable):
        raise _BadRow(record.reason)
    question = _text(record, layout.question)
    options = _options(record, layout.options)
    names = [name for _, name, _, _ in Formatter().parse(layout.video) if name]
    video = layout.video.format_map(
        {n: extra[n] if n in extra else _name(record, n) for n in names}
    )
    row_id = _name(record, layout.id) if _given(record, layout.id) else str(number)
    prompt = question
    if options:
        listed = (
            layout.option.format(letter=letter, text=text)
            for letter, text in zip(ascii_uppercase, options, strict=False)
        )
        prompt = layout.prompt.format(question=question, options="\n".join(listed))
    target = record.get(layout.target)
    return Row(
        number,
        row_id,
        video,
        _find(base, video, layout.suffixes),
        question,
        options,
        prompt,
        None if target is None else str(target),
    )


def _given(record: Record, name: str) -> bool:
    return record.get(name) not in (None, "")


def _text(record: Record, name: str) -> str:
    if name not in record:
        raise _BadRow(f"there is no field {name!r}{_nearest(name, record)}")
    return _clean(name, record[name])


def _name(record: Record, name: str) -> str:
    """A text or a whole number, as text."""
    value = record.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(record, name)


def _clean(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _BadRow(f"{name} is {_shown(value)}; it must be text that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _BadRow(f"{name} is not UTF-8 text") from None
    return value


def _options(record: Record, name: str) -> tuple[str, ...]:
    if name not in record and (near := _nearest(name, record)):
        raise _BadRow(f"there is no field {name!r}{near}")
    value = record.get(name)
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except ValueError:
            raise _BadRow(f"{name} is {_shown(value)}; it must be a list in JSON") from None
    if not value:
        return ()
    if not isinstance(value, Sequence) or not 2 <= len(value) <= len(ascii_uppercase):
        raise _BadRow(f"{name} is {_shown(value)}; it must be a list of 2 to 26 texts")
    return tuple(_clean(f"{name}[{i}]", text) for i, text in enumerate(value))


def _nearest(name: str, record: Record) -> str:
    """A hint at a misspelt field; empty when nothing looks like it."""
    near = difflib.get_close_matches(name, map(str, record), n=1, cutoff=0.85)
    return f"; is {near[0]!r} meant to be it?" if near else ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _find(base: Path, video: str, suffixes: Iterable[str]) -> str:
    """The path of a video; that of the first ending where none exists."""
    if "://" in video:
        return video
    places = [os.path.normpath(base / f"{video}{suffix}") for suffix in suffixes]
    return next((place for place in places if os.path.exists(place)), places[0])
