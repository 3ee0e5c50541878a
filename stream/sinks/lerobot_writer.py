"""Episodes as a LeRobotDataset v3: mp4 and parquet, which lerobot itself opens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..closing import Closing
from ..errors import ConfigError, SourceError

IMAGES = "observation.images."


class LeRobotWriter(Closing):
    """Writes frames of episodes under `folder`.

    fps: control periods a second, a whole number. cameras: name -> (height, width). state, action:
    names of their numbers. extras: name -> shape of further float32 features of a frame.
    A folder that holds a dataset of the same features is gone on with.

    Episodes are whole or absent: what was added since the last `end_episode` is dropped by `close`.
    Raises SourceError where the folder is not empty and no such dataset.
    """

    def __init__(
        self,
        folder: Path,
        fps: float,
        cameras: Mapping[str, tuple[int, int]],
        state_size: int,
        action_size: int,
        robot: str,
        extras: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        import av.logging
        import datasets
        from lerobot.configs.video import RGBEncoderConfig
        from lerobot.datasets.lerobot_dataset import LeRobotDataset

        av.logging.set_libav_level(av.logging.ERROR)  # else a page of text for each video
        datasets.disable_progress_bars()
        if round(fps) < 1 or abs(fps - round(fps)) > 1e-6:
            raise ConfigError(f"{fps} frames a second; a LeRobotDataset needs a whole number.")
        features: dict[str, Any] = {
            "observation.state": _floats((state_size,)),
            "action": _floats((action_size,)),
            **{name: _floats(shape) for name, shape in (extras or {}).items()},
        }
        for name, size in cameras.items():
            names = ["height", "width", "channels"]
            features[IMAGES + name] = {"dtype": "video", "shape": (*size, 3), "names": names}
        encoder = RGBEncoderConfig(vcodec="h264", pix_fmt="yuv420p", crf=12, preset="veryfast")
        name = f"local/{folder.resolve().name}"
        how: dict[str, Any] = {
            "rgb_encoder": encoder,
            "streaming_encoding": True,
            "encoder_threads": 1,
            "video_backend": "pyav",
        }
        if (folder / "meta" / "info.json").is_file():
            self._dataset = LeRobotDataset.resume(name, root=folder, **how)
            _check(self._dataset, folder, round(fps), features)
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise SourceError(f"{folder} is not empty and no LeRobotDataset; name a new folder.")
        else:
            if folder.exists():
                folder.rmdir()
            self._dataset = LeRobotDataset.create(
                name, round(fps), features, root=folder, robot_type=robot, **how
            )

    @property
    def episodes(self) -> int:
        return int(self._dataset.meta.total_episodes)

    def add(
        self,
        images: Mapping[str, NDArray[np.uint8]],
        state: NDArray[np.float32],
        action: NDArray[np.float32],
        task: str,
        **extras: NDArray[np.float32],
    ) -> None:
        """One control period: what was seen, felt and done. task: the instruction."""
        pictures = {IMAGES + name: image for name, image in images.items()}
        values = {"observation.state": state, "action": action, **extras}
        self._dataset.add_frame({**pictures, **values, "task": task})

    def end_episode(self) -> None:
        self._dataset.save_episode()

    def close(self) -> None:
        if self._dataset.has_pending_frames():
            self._dataset.clear_episode_buffer()
        self._dataset.finalize()


def _floats(shape: tuple[int, ...]) -> dict[str, Any]:
    return {"dtype": "float32", "shape": shape, "names": None}


def _check(dataset: Any, folder: Path, fps: int, features: Mapping[str, Any]) -> None:
    """Whether a dataset that is there takes frames of these features."""
    for name, wanted in features.items():
        there = dataset.meta.features.get(name)
        if dataset.fps != fps or there is None or tuple(there["shape"]) != tuple(wanted["shape"]):
            raise SourceError(
                f"{folder} holds a dataset of another robot ({name} differs); name a new folder."
            )
