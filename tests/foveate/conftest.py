"""A small LLaVA-OneVision checkpoint with random weights, and a short real video."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from foveate.settings import reducer_of
from policies.reasoner import VideoReasoner
from policies.video.tiny.modeling import make_model, save_checkpoint
from stream.reducers.base import Reducer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(make_model(seed=0), folder)
    return folder


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 frames of 64 x 48: a still picture with a moving bright square."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    background = np.random.default_rng(0).integers(0, 120, (48, 64, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for t in range(24):
            image = background.copy()
            image[8:16, 2 * t : 2 * t + 8] = 250
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


@pytest.fixture(scope="session")
def serving() -> tuple[VideoReasoner, Reducer]:
    """The model in the box, loaded once for all tests of the server."""
    reducer = reducer_of("holitom_outer")
    return VideoReasoner.load("tiny-video", reducer, "cpu"), reducer
