"""One camera of one episode of a LeRobotDataset v3, on this disk.

    DIR                 the first episode, its first camera
    DIR#12              episode 12
    DIR#12/wrist        its camera observation.images.wrist

Episodes lie one after another in the dataset's mp4 files; times here start at the episode's start.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from stream.data import Frame
from stream.errors import SourceError

from .base import DATASET_INFO, DecodeReport, Source, SourceInfo
from .sampling import Sampling, Within
from .video_file import VideoFile

IMAGES = "observation.images."


class LeRobotEpisode(Source):
    """See above. instruction: what the robot was told.

    Raises SourceError for an episode or a camera that is not there, naming those that are.
    """

    def __init__(self, address: str) -> None:
        path, _, part = address.partition("#")
        number, _, camera = part.partition("/")
        self._name, self._folder = address, Path(path)
        about = self._about()
        key = self._key(about, camera)
        row = self._row(number or "0", key)
        video = about["video_path"].format(
            video_key=key, chunk_index=row["chunk_index"], file_index=row["file_index"]
        )
        self._video = VideoFile(self._folder / video)
        self._start_s, self._stop_s = row["from_timestamp"], row["to_timestamp"]
        self._length, self._fps = row["length"], float(about["fps"])
        self.instruction = ", ".join(row["tasks"])

    @property
    def info(self) -> SourceInfo:
        return replace(
            self._video.info,
            name=self._name,
            duration_s=self._stop_s - self._start_s,
            frames_estimate=self._length,
            average_fps=self._fps,
        )

    @property
    def report(self) -> DecodeReport:
        return self._video.report

    def read(self, sampling: Sampling, start: int = 0) -> Iterator[Frame]:
        """See `Source.read`. Frame.index is the frame's place in the episode."""
        first = round(self._start_s * self._fps)
        for frame in self._video.read(Within(sampling, self._start_s, self._stop_s), start):
            yield Frame(frame.image, frame.pts_s - self._start_s, frame.index - first)

    def close(self) -> None:
        self._video.close()

    def _about(self) -> dict[str, Any]:
        try:
            about: dict[str, Any] = json.loads((self._folder / DATASET_INFO).read_text())
            version = str(about["codebase_version"])
        except (OSError, ValueError, KeyError) as error:
            raise SourceError(f"{self._folder / DATASET_INFO} cannot be read ({error}).") from None
        if not version.startswith("v3"):
            raise SourceError(
                f"{self._folder} is a LeRobotDataset {version}; v3 is read. Convert it with "
                "lerobot's own script."
            )
        return about

    def _key(self, about: dict[str, Any], camera: str) -> str:
        keys = [key for key, is_ in about["features"].items() if is_["dtype"] == "video"]
        wanted = [key for key in keys if camera in ("", key, key.removeprefix(IMAGES))]
        if not wanted:
            there = ", ".join(key.removeprefix(IMAGES) for key in keys) or "none"
            raise SourceError(
                f"{self._folder} has no video of {camera or 'any camera'}; there are: {there}."
            )
        return wanted[0]

    def _row(self, number: str, key: str) -> dict[str, Any]:
        """The episode's length and tasks, and where its video of this camera is."""
        from pyarrow import ArrowException, parquet

        columns = ["episode_index", "length", "tasks"]
        columns += [f"videos/{key}/{n}" for n in ("chunk_index", "file_index")]
        columns += [f"videos/{key}/{n}_timestamp" for n in ("from", "to")]
        there = 0
        try:
            for file in sorted((self._folder / "meta" / "episodes").rglob("*.parquet")):
                table = parquet.read_table(file, columns=columns)
                for row in table.to_pylist():
                    if str(row["episode_index"]) == number:
                        return {name.rpartition("/")[2]: value for name, value in row.items()}
                there += len(table)
        except (OSError, ArrowException, KeyError) as error:
            raise SourceError(f"{self._folder} names its episodes badly: {error}.") from None
        raise SourceError(
            f"{self._folder} has no episode {number!r}; it has {there}, counted from 0."
        )
