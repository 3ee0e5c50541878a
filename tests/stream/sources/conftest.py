"""Clean videos, written once; damaged ones are made from them by the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stream.sources.making import write_video

FAST = {"preset": "veryfast"}


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="session")
def clean_mp4(media: Path) -> Path:
    """48 frames of 160x96 at 24 fps, h264 with B-frames, one keyframe."""
    return write_video(media / "clean.mp4", options=FAST)


@pytest.fixture(scope="session")
def clean_mkv(media: Path) -> Path:
    return write_video(media / "clean.mkv", options=FAST)


@pytest.fixture(scope="session")
def front_index_mp4(media: Path) -> Path:
    movflags = {"movflags": "+faststart"}
    return write_video(media / "front.mp4", options=FAST, container_options=movflags)
