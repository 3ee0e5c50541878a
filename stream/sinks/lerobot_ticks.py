"""A driven episode as a LeRobotDataset with what the policy kept of each picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..ticks import Tick
from .base import TickSink
from .lerobot_writer import LeRobotWriter


class LeRobotTicks(TickSink):
    """One frame a control period; all of a tick's frames carry the tick's features.

    keep_mask: [cameras, rows, cols], 1 where a patch has a token of its own; 0 everywhere where the
    actions came from no look at all. tokens, elapsed_ms, late: of the tick. A camera that gave
    nothing is black, a state that was unusable is the one before. See LeRobotWriter for what it
    raises.
    """

    needs_film = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: LeRobotWriter | None = None

    def begin(self, about: Mapping[str, Any]) -> None:
        self._pixels = {camera: tuple(size) for camera, size in about["cameras"].items()}
        self._grid = tuple(about["grid"])
        self._state = np.zeros(about["state_size"], np.float32)
        if self._writer is None:
            one = {"tokens": (1,), "elapsed_ms": (1,), "late": (1,)}
            self._writer = LeRobotWriter(
                self._folder,
                1 / about["dt_s"],
                self._pixels,
                about["state_size"],
                about["action_size"],
                about["environment"],
                {"keep_mask": self._grid, **one},
            )

    def write(self, tick: Tick) -> None:
        assert self._writer is not None, "begin an episode first"
        features = {
            "keep_mask": self._mask(tick),
            "tokens": _one(tick.decision.tokens),
            "elapsed_ms": _one(tick.elapsed_ms),
            "late": _one(tick.late),
        }
        for seen, action in zip(tick.seen, tick.executed, strict=True):
            images = {c: np.zeros((*size, 3), np.uint8) for c, size in self._pixels.items()}
            if seen is not None:
                images |= {c: i for c, i in seen.images.items() if i is not None and c in images}
                self._state = seen.state
            self._writer.add(images, self._state, action, tick.instruction, **features)

    def end(self, summary: Mapping[str, Any]) -> None:
        assert self._writer is not None, "begin an episode first"
        self._writer.end_episode()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _mask(self, tick: Tick) -> NDArray[np.float32]:
        mask = np.zeros(self._grid, np.float32)
        if tick.plan is not None and tick.grid is not None:
            kept = np.zeros(tick.grid.size, np.float32)
            kept[tick.plan.anchor.numpy(force=True)] = 1
            cameras = [list(self._pixels).index(camera) for camera in tick.cameras]
            mask[cameras] = kept.reshape(len(cameras), *self._grid[1:])
        return mask


def _one(value: float) -> NDArray[np.float32]:
    return np.array([value], np.float32)
