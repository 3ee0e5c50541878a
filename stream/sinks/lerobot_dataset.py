"""What a robot did, and what it looked at, as a LeRobotDataset: one frame a control period."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..ticks import Tick
from .base import TickSink
from .lerobot_writer import LeRobotWriter
from .patch_paint import DROPPED, Fates


class Dataset(TickSink):
    """Writes under `folder`; goes on with a dataset of the same robot that is there.

    Beside pictures, state and executed action a frame holds keep.CAMERA, float32 [rows, cols]: 1
    where a patch was kept or merged at the latest decision. A camera that gave nothing is black,
    with no patch kept. Frames before the first decision from all cameras are left out: until then
    the sizes are not known.
    """

    needs_film = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: LeRobotWriter | None = None
        self._frames = 0

    def begin(self, about: Mapping[str, Any]) -> None:
        self._about = about

    def write(self, tick: Tick) -> None:
        writer = self._writer = self._writer or self._open(tick)
        if writer is None:
            return
        keep = {f"keep.{camera}": mask for camera, mask in self._kept(tick).items()}
        sizes = self._sizes.items()
        executed = tick.executed[len(tick.executed) - len(tick.seen) :]
        for seen, action in zip(tick.seen, executed, strict=True):
            given = {camera: i for camera, i in seen.images.items() if i is not None}
            images = {c: given.get(c, np.zeros((*size, 3), np.uint8)) for c, size in sizes}
            writer.add(images, seen.state, action, tick.instruction, keep)
            self._frames += 1

    def end(self, summary: Mapping[str, Any]) -> None:
        if self._writer and self._frames:
            self._writer.end_episode()
        self._frames = 0

    def close(self) -> None:
        if self._writer:
            self._writer.close()
            self._writer = None

    def _open(self, tick: Tick) -> LeRobotWriter | None:
        """A writer for frames like those of this tick; None if it does not show all sizes."""
        if tick.grid is None or not tick.seen:
            return None
        pictures = {c: i for c, i in tick.seen[0].images.items() if i is not None}
        if set(pictures) != set(self._about["cameras"]):
            return None
        self._sizes = {camera: (len(i), len(i[0])) for camera, i in pictures.items()}
        self._cells = tick.grid.rows, tick.grid.cols
        return LeRobotWriter(
            self._folder,
            1 / self._about["dt_s"],
            self._sizes,
            len(tick.seen[0].state),
            tick.executed.shape[1],
            str(self._about["environment"]).partition(":")[0],
            {f"keep.{camera}": self._cells for camera in self._sizes},
        )

    def _kept(self, tick: Tick) -> dict[str, NDArray[np.float32]]:
        kept: dict[str, NDArray[np.float32]] = {
            camera: np.zeros(self._cells, np.float32) for camera in self._sizes
        }
        if tick.plan is not None and tick.grid is not None:
            owner = Fates.of(tick.plan, tick.grid).owner
            for camera, patches in zip(tick.cameras, owner, strict=True):
                kept[camera] = (patches != DROPPED).astype(np.float32)
        return kept
