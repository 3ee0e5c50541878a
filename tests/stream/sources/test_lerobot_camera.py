"""LeRobot's own cameras, by config. A video file stands for a device: OpenCV opens both alike."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from lerobot.cameras.opencv import OpenCVCamera

from stream.errors import SourceError
from stream.sources.lerobot_camera import open_camera

SAMPLES = Path(__file__).parents[3] / "policies" / "checkpoints" / "tiny_video" / "samples"


def test_a_camera_gives_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = OpenCVCamera._read_from_hardware

    def paced(camera: OpenCVCamera) -> Any:
        time.sleep(0.03)  # a device has a rate, a file has none
        return read(camera)

    monkeypatch.setattr(OpenCVCamera, "_read_from_hardware", paced)
    film = next(SAMPLES.glob("*.mp4"))
    config = tmp_path / "camera.yaml"
    config.write_text(f"type: opencv\nindex_or_path: {film}\nwarmup_s: 0\n")
    camera = open_camera(str(config))
    picture = camera.read()
    assert picture.ndim == 3
    assert picture.shape[2] == 3
    assert picture.std() > 0
    camera.close()
    camera.close()


@pytest.mark.parametrize("text", ["", "type: gramophone", "type: opencv\nindex: 0", "- 1"])
def test_a_config_of_no_camera_is_said(text: str, tmp_path: Path) -> None:
    config = tmp_path / "camera.yaml"
    config.write_text(text)
    with pytest.raises(SourceError, match="describes no LeRobot camera"):
        open_camera(str(config))


def test_a_config_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="No such file"):
        open_camera(str(tmp_path / "camera.yaml"))
