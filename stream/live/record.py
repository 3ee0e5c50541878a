"""A record of a watched stream: one JSON line for everything that happened to its frames.

DIR/stream.jsonl begins with a header; DIR/frames/STREAM/PTS.jpg are small pictures of what was
looked at. It is flushed line by line, so a killed run leaves a readable record.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from stream.errors import ConfigError
from stream.plan import Plan
from stream.sources.live_values import LiveFrame

FORMAT = "foveate-stream"
VERSION = 1
FILE = "stream.jsonl"
_SIDE_PX = 160


class Recorder:
    """Writes a record; a `Listener` of a Watcher.

    header: what was watched, as plain data without secrets. pictures: whether small pictures of
    the frames are kept.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], *, pictures: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / FILE).exists():
            raise ConfigError(f"{folder} holds a record already; give an empty folder.")
        self._folder, self._pictures = folder, pictures
        self._file = (folder / FILE).open("w")
        self._write({"format": FORMAT, "version": VERSION, **header})

    def saw(self, stream: str, got: LiveFrame) -> None:
        if got.dropped or got.gap is not None:
            self.told(
                {
                    "kind": "missed",
                    "stream": stream,
                    "pts_s": got.frame.pts_s,
                    "dropped": got.dropped,
                    "gap": None if got.gap is None else list(got.gap.causes),
                }
            )
        if self._pictures:
            path = picture_path(self._folder, stream, got.frame.pts_s)
            path.parent.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(got.frame.image)
            small.thumbnail((_SIDE_PX, _SIDE_PX))
            small.save(path, quality=70)

    def told(self, row: Mapping[str, Any]) -> None:
        self._write({k: v.to_record() if isinstance(v, Plan) else v for k, v in row.items()})

    def close(self) -> None:
        self._file.close()

    def _write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def picture_path(folder: Path, stream: str, pts_s: float) -> Path:
    safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in stream)
    return folder / "frames" / safe / f"{pts_s:012.3f}.jpg"


def is_record(folder: Path) -> bool:
    return (folder / FILE).is_file()


def read(folder: Path) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
    """(header, the rows after it). A last line that was cut short is left out.

    Raises ConfigError for what is no record of this format.
    """
    if not is_record(folder):
        raise ConfigError(f"{folder} holds no {FILE}; give a folder that `--record` wrote.")
    lines = (folder / FILE).read_text().splitlines()
    header = _parsed(lines[0]) if lines else None
    if header is None or header.get("format") != FORMAT or header.get("version") != VERSION:
        raise ConfigError(f"{folder / FILE} does not begin with a {FORMAT} header of version 1.")
    rows = (row for line in lines[1:] if (row := _parsed(line)) is not None)
    return header, rows


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None
