"""decord gives what PyAV gives from clean files, and a SourceError from others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stream.errors import SourceError
from stream.sources import Fps, Sampling, Uniform, open_source
from tests.stream.sources.making import corrupt_packets, cut, turn, write_video


@pytest.mark.parametrize("sampling", [Uniform(6), Fps(7), Fps(1000)])
@pytest.mark.parametrize("degrees", [0, 90])
def test_equal_frames_on_a_clean_file(
    clean_mp4: Path, tmp_path: Path, sampling: Sampling, degrees: int
) -> None:
    video = turn(clean_mp4, tmp_path / "v.mp4", degrees)
    with open_source(video) as one, open_source(video, decoder="decord") as other:
        assert one.info == other.info
        frames, same = list(one.read(sampling)), list(other.read(sampling))
        assert other.report.complete
    assert [(f.index, f.pts_s) for f in frames] == [(f.index, f.pts_s) for f in same]
    for frame, twin in zip(frames, same, strict=True):
        error = np.abs(frame.image.astype(int) - twin.image)
        assert error.max() <= 4
        assert error.mean() < 1.5


def test_variable_frame_rate(tmp_path: Path) -> None:
    pts_ms = [0, 40, 80, 1000, 3000, 3040, 6000]
    video = write_video(tmp_path / "vfr.mp4", 7, pts=pts_ms, options={"bf": "0"})
    with open_source(video, decoder="decord") as source:
        assert [f.index for f in source.read(Fps(1))] == [0, 3, 4, 5, 6]


def test_resuming(clean_mp4: Path) -> None:
    with open_source(clean_mp4, decoder="decord") as source:
        whole, rest = list(source.read(Uniform(5))), list(source.read(Uniform(5), 2))
    assert [frame.index for frame in rest] == [frame.index for frame in whole[2:]]


def test_damaged_files_are_refused_or_said(
    clean_mp4: Path, clean_mkv: Path, tmp_path: Path
) -> None:
    corrupt = corrupt_packets(clean_mp4, tmp_path / "corrupt.mp4", [10, 11, 12, 30])
    with pytest.raises(SourceError, match="use the decoder pyav"):
        list(open_source(corrupt, decoder="decord").read(Uniform(4)))
    with open_source(cut(clean_mkv, tmp_path / "cut.mkv", 0.6), decoder="decord") as source:
        list(source.read(Uniform(4)))
        assert source.report.truncated is not None


def test_mirrored_and_tiny_pictures_are_refused(clean_mp4: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="mirrored"):
        open_source(turn(clean_mp4, tmp_path / "m.mp4", 0, mirrored=True), decoder="decord")
    pixel = write_video(tmp_path / "1.mkv", 2, (1, 1), codec="ffv1", pix_fmt="yuv444p")
    with pytest.raises(SourceError, match="it gives pictures of shape"):
        list(open_source(pixel, decoder="decord").read(Uniform(1)))
