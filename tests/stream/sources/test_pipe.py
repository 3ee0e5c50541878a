"""Named pipes: one pass, bounded memory, never an endless wait."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stream.errors import SourceError
from stream.sources import Fps, Sampling, Uniform, open_source
from tests.stream.sources.making import cut

Feeder = Callable[..., Path]


@pytest.fixture
def feed(tmp_path: Path) -> Feeder:
    """A pipe whose writer gives `data`, then keeps it open for `stall_s`."""

    def start(data: bytes | None, stall_s: float = 0.0) -> Path:
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)

        def write() -> None:
            try:
                with pipe.open("wb") as opened:
                    opened.write(data or b"")
                    opened.flush()
                    time.sleep(stall_s)
            except BrokenPipeError:
                pass

        if data is not None:
            threading.Thread(target=write, daemon=True).start()
        return pipe

    return start


@pytest.mark.parametrize("sampling", [Fps(6), Fps(1000), Fps(12, max_frames=13), Uniform(64)])
def test_a_pipe_gives_what_the_file_gives(
    feed: Feeder, clean_mkv: Path, sampling: Sampling
) -> None:
    with open_source(clean_mkv) as source:
        expected = list(source.read(sampling))
    with open_source(feed(clean_mkv.read_bytes())) as source:
        assert (source.info.width, source.info.height) == (160, 96)
        frames = list(source.read(sampling))
        assert source.report.complete
    assert [(f.index, f.pts_s) for f in frames] == [(f.index, f.pts_s) for f in expected]
    for frame, other in zip(frames, expected, strict=True):
        assert np.array_equal(frame.image, other.image)


@pytest.mark.parametrize("start", [0, 3, 20])
def test_uniform_over_an_unknown_length(feed: Feeder, clean_mkv: Path, start: int) -> None:
    with open_source(feed(clean_mkv.read_bytes())) as source:
        indices = [frame.index for frame in source.read(Uniform(9), start)]
    even = np.linspace(0, 47, 9)[start:]
    assert len(indices) == len(even)
    assert all(abs(index - place) <= 6 for index, place in zip(indices, even, strict=True))


def test_fps_frames_come_before_the_pipe_ends(feed: Feeder, clean_mkv: Path) -> None:
    pipe = feed(clean_mkv.read_bytes()[:-500], stall_s=30)
    with open_source(pipe, timeout_s=0.3) as source:
        began_s = time.perf_counter()
        next(source.read(Fps(1)))
        assert time.perf_counter() - began_s < 0.3


def test_a_pipe_is_read_once(feed: Feeder, clean_mkv: Path) -> None:
    with open_source(feed(clean_mkv.read_bytes())) as source:
        list(source.read(Uniform(2)))
        with pytest.raises(SourceError, match="is a pipe and has been read"):
            source.read(Uniform(2))


def test_closing_early_ends_the_reading(feed: Feeder, clean_mkv: Path) -> None:
    with open_source(feed(clean_mkv.read_bytes())) as source:
        reading = source.read(Fps(1000))
        next(reading)
    assert next(reading, None) is None


def test_a_writer_that_never_comes(feed: Feeder) -> None:
    with pytest.raises(SourceError, match="is a pipe that gave no data"):
        open_source(feed(None), timeout_s=0.2)


def test_a_writer_that_stalls_loses_nothing(feed: Feeder, clean_mkv: Path) -> None:
    data = clean_mkv.read_bytes()
    with open_source(feed(data[: len(data) // 2], stall_s=30), timeout_s=0.2) as source:
        frames = list(source.read(Uniform(100)))
        assert len(frames) > 8
        assert source.report.truncated is not None
        assert "gave no data for 0.2 s" in source.report.truncated


def test_a_pipe_that_ends_early(feed: Feeder, clean_mkv: Path, tmp_path: Path) -> None:
    short = cut(clean_mkv, tmp_path / "cut.mkv", 0.6)
    with open_source(feed(short.read_bytes())) as source:
        assert len(list(source.read(Uniform(100)))) > 8
        assert source.report.truncated is not None


def test_pipes_that_carry_no_video(feed: Feeder) -> None:
    with pytest.raises(SourceError, match="ended after 11 bytes"):
        open_source(feed(b"not a video"))


def test_a_pipe_that_ends_at_once(feed: Feeder) -> None:
    with pytest.raises(SourceError, match="ended without any data"):
        open_source(feed(b""))


def test_decord_reads_no_pipes(feed: Feeder) -> None:
    with pytest.raises(SourceError, match="decord cannot read"):
        open_source(feed(None), decoder="decord")
