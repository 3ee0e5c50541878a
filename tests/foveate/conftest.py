"""Models that several tests load: a small one with random weights, and the one in the box."""

from __future__ import annotations

from pathlib import Path

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
def serving() -> tuple[VideoReasoner, Reducer]:
    """The model in the box, loaded once for all tests of the server."""
    reducer = reducer_of("holitom_outer")
    return VideoReasoner.load("tiny-video", reducer, "cpu"), reducer
