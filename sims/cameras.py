"""Two upright cameras over a MuJoCo model, as cheap as they can be: no shadows, reflections, MSAA.

On Mesa's CPU driver that is a tenth of the time of MuJoCo's defaults.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream.errors import SimulatorError

NAMES = ("scene", "wrist")


@dataclass(frozen=True, slots=True)
class Ornament:
    """Something that is seen and cannot be touched. kind: sphere, cylinder or box.

    size: MuJoCo's half sizes in metres. rgb: in [0, 1].
    """

    kind: str
    size: tuple[float, float, float]
    position: NDArray[np.float64]
    rgb: tuple[float, float, float]


def import_mujoco() -> Any:
    """MuJoCo, told to render without a display where there is none."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        import mujoco
    except (ImportError, AttributeError, OSError) as error:
        raise SimulatorError(
            f"MuJoCo cannot be loaded ({error}). Without a display it renders through EGL: "
            "apt install libegl1 libgl1, and see `foveate doctor`."
        ) from error
    return mujoco


class Cameras:
    """'scene' sees the table from the robot's right, 'wrist' looks down from the gripper."""

    def __init__(self, model: Any, pixels: int) -> None:
        mujoco = self._mujoco = import_mujoco()
        model.vis.quality.offsamples = 0
        try:
            self._renderer = mujoco.Renderer(model, pixels, pixels)
        except Exception as error:  # each backend has its own kind
            raise SimulatorError(
                f"MuJoCo cannot render here ({error}). Without a display it needs EGL and GL: "
                "apt install libegl1 libgl1, and see `foveate doctor`."
            ) from error
        flags = self._renderer.scene.flags
        flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        self._options = mujoco.MjvOption()
        self._options.sitegroup[:] = 0
        scene = mujoco.MjvCamera()
        scene.azimuth, scene.elevation, scene.distance = 162, -35, 0.95
        scene.lookat[:] = (0, 0.7, 0.1)
        self._cameras = dict(zip(NAMES, (scene, "gripperPOV"), strict=True))

    def render(self, data: Any, ornaments: Iterable[Ornament]) -> dict[str, NDArray[np.uint8]]:
        """uint8 [pixels, pixels, 3] of each camera."""
        images = {}
        for name, camera in self._cameras.items():
            self._renderer.update_scene(data, camera, self._options)
            for ornament in ornaments:
                self._add(ornament)
            images[name] = self._renderer.render()
        return images

    def locate(self, data: Any, points: NDArray[np.float64]) -> NDArray[np.float32]:
        """points [m, 3] in metres -> float32 [cameras, m, 2], row and column in pixels; NaN for
        what is NaN or behind a camera.
        """
        located = []
        for camera in self._cameras.values():
            self._renderer.update_scene(data, camera, self._options)
            eyes = self._renderer.scene.camera
            away = points - (eyes[0].pos + eyes[1].pos) / 2
            forward, up = eyes[0].forward, eyes[0].up
            depth = away @ forward
            half = (eyes[0].frustum_top - eyes[0].frustum_bottom) / 2 / eyes[0].frustum_near
            seen = np.stack([-(away @ up), away @ np.cross(forward, up)], axis=-1)
            with np.errstate(invalid="ignore", divide="ignore"):
                seen = np.where(depth[:, None] > 0, seen / (half * depth[:, None]), np.nan)
            located.append((seen + 1) / 2 * self._renderer.height)
        return np.array(located, dtype=np.float32)

    def _add(self, ornament: Ornament) -> None:
        scene = self._renderer.scene
        geom = scene.geoms[scene.ngeom]
        self._mujoco.mjv_initGeom(
            geom,
            getattr(self._mujoco.mjtGeom, f"mjGEOM_{ornament.kind.upper()}"),
            np.array(ornament.size, dtype=np.float64),
            ornament.position,
            np.eye(3).ravel(),
            np.array([*ornament.rgb, 1], dtype=np.float32),
        )
        geom.emission = 0.3
        scene.ngeom += 1

    def close(self) -> None:
        self._renderer.close()
