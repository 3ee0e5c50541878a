"""Episodes as JSON lines and lossless pictures: what `foveate replay` reads.

    FOLDER/episode_0000/ticks.jsonl        first line: about; then one a tick; last line: summary
    FOLDER/episode_0000/frames/000012_top.png

Every line is flushed. A killed run leaves whole lines and perhaps a cut one, which is not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from ..data import Observation
from ..errors import SourceError
from ..ticks import Tick
from .base import TickSink


class JsonLines(TickSink):
    """Writes under `folder`; raises SourceError where an earlier recording is."""

    def __init__(self, folder: Path) -> None:
        if folder.exists() and any(folder.iterdir()):
            raise SourceError(f"{folder} is not empty; name a new folder for the recording.")
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._episodes = 0
        self._file: IO[str] | None = None

    def begin(self, about: Mapping[str, Any]) -> None:
        self.close()
        self._episode = self._folder / f"episode_{self._episodes:04d}"
        (self._episode / "frames").mkdir(parents=True)
        self._file = (self._episode / "ticks.jsonl").open("w", encoding="utf-8")
        self._episodes += 1
        self._line({"kind": "about", **about})

    def write(self, tick: Tick) -> None:
        frames: dict[str, str | None] = {}
        if tick.observation is not None:
            for camera, image in tick.observation.images.items():
                frames[camera] = None
                if image is not None:
                    name = f"frames/{tick.number:06d}_{camera}.png"
                    Image.fromarray(image).save(self._episode / name, compress_level=1)
                    frames[camera] = name
        self._line({"kind": "tick", **tick.to_record(), "frames": frames})

    def end(self, summary: Mapping[str, Any]) -> None:
        self._line({"kind": "summary", **summary})
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _line(self, record: Mapping[str, Any]) -> None:
        assert self._file is not None, "begin an episode first"
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()


@dataclass(frozen=True, slots=True)
class Recording:
    """One recorded episode. summary: None where the run was killed."""

    folder: Path
    about: dict[str, Any]
    ticks: tuple[dict[str, Any], ...]
    summary: dict[str, Any] | None

    def observation(self, tick: Mapping[str, Any]) -> Observation | None:
        """What the policy saw at a tick; None where the sensors gave nothing usable.

        Raises SourceError where a picture is gone.
        """
        if tick["state"] is None:
            return None
        images = {}
        for camera, name in tick["frames"].items():
            try:
                picture = None if name is None else Image.open(self.folder / name)
            except OSError as error:
                raise SourceError(f"{self.folder / name} cannot be read: {error}.") from None
            images[camera] = None if picture is None else np.array(picture.convert("RGB"))
        state = np.asarray(tick["state"], np.float32)
        return Observation(images, state, tick["instruction"], tick["time_s"])


def read(folder: Path) -> tuple[Recording, ...]:
    """All episodes of a recording, or the one whose folder is given.

    Raises SourceError where there is none.
    """
    single = folder / "ticks.jsonl"
    files = [single] if single.is_file() else sorted(folder.glob("episode_*/ticks.jsonl"))
    found = [episode for file in files if (episode := _read_episode(file)) is not None]
    if not found:
        raise SourceError(
            f"{folder} holds no recorded episode; record one with `foveate drive --record DIR`."
        )
    return tuple(found)


def _read_episode(file: Path) -> Recording | None:
    by_kind: dict[str, list[dict[str, Any]]] = {"about": [], "tick": [], "summary": []}
    for line in file.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            continue
        try:
            record = json.loads(line)
            by_kind[record.pop("kind")].append(record)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise SourceError(f"{file} holds a line that is no record: {line[:60]!r}.") from None
    if not by_kind["about"]:
        return None
    summary = by_kind["summary"][0] if by_kind["summary"] else None
    return Recording(file.parent, by_kind["about"][0], tuple(by_kind["tick"]), summary)
