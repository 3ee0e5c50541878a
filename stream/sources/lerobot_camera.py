"""Cameras of LeRobot by their own configs: `lerobot:camera.yaml`.

type: opencv            # intelrealsense, reachy2_camera, zmq, or a plug-in's
index_or_path: 0
width: 640
height: 480
fps: 30
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from stream.errors import SourceError

_TIMEOUT_MS = 1000.0


class LeRobotCamera:
    """A connected camera of lerobot; reads the newest picture."""

    def __init__(self, camera: Any) -> None:
        self._camera = camera
        camera.connect()

    def read(self) -> NDArray[np.uint8]:
        picture: NDArray[np.uint8] = self._camera.async_read(timeout_ms=_TIMEOUT_MS)
        return picture

    def close(self) -> None:
        if self._camera.is_connected:
            self._camera.disconnect()


def open_camera(path: str) -> LeRobotCamera:
    """The camera that a YAML file describes. Raises SourceError for a file that describes none."""
    try:
        import draccus
        from lerobot.cameras import CameraConfig, make_cameras_from_configs
        from lerobot.cameras.opencv import OpenCVCameraConfig  # noqa: F401  registers its type
    except ImportError as error:
        raise SourceError(f"A LeRobot camera needs lerobot, which lacks: {error}") from None
    try:
        config = draccus.decode(CameraConfig, yaml.safe_load(Path(path).read_text()))
        (camera,) = make_cameras_from_configs({"camera": config}).values()
    except Exception as error:
        raise SourceError(
            f"{path} describes no LeRobot camera ({error}); it must hold such lines as "
            "`type: opencv` and `index_or_path: 0`."
        ) from error
    return LeRobotCamera(camera)
