"""Folders of images and single images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stream.errors import SourceError
from stream.sources import Fps, Uniform, open_source
from stream.sources.images import natural_key
from tests.stream.sources.making import picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """frame1 ... frame12 of different kinds and sizes, and a text beside them."""
    path = tmp_path / "images"
    path.mkdir()
    for number in range(1, 13):
        suffix = ("png", "bmp", "JPG", "webp")[number % 4]
        image = Image.fromarray(picture(number, 40 + number, 30))
        image.save(path / f"frame{number}.{suffix}")
    (path / "notes.txt").write_text("not an image")
    return path


def test_images_come_in_natural_order(folder: Path) -> None:
    with open_source(folder) as source:
        assert (source.info.width, source.info.height) == (41, 30)
        assert source.info.frames_estimate == 12
        frames = list(source.read(Fps(1)))
        assert "files left out, not images: 1" in source.report.said
        assert source.report.complete
    assert [frame.image.shape for frame in frames] == [(30, 40 + n, 3) for n in range(1, 13)]
    assert [frame.pts_s for frame in frames] == list(range(12))
    assert np.array_equal(frames[3].image, picture(4, 44, 30))


def test_sampling_and_resuming(folder: Path) -> None:
    with open_source(folder) as source:
        assert [f.index for f in source.read(Uniform(3))] == [0, 5, 11]
        assert [f.index for f in source.read(Uniform(3), 1)] == [5, 11]
        assert [f.index for f in source.read(Fps(0.5))] == [0, 2, 4, 6, 8, 10]


def test_unreadable_images_are_counted(folder: Path) -> None:
    whole = (folder / "frame3.webp").read_bytes()
    (folder / "frame3.webp").write_bytes(whole[: len(whole) // 2])
    (folder / "frame5.bmp").write_text("no")
    with open_source(folder) as source:
        frames = list(source.read(Fps(1)))
        report = source.report
        assert next(source.read(Fps(1), 4)).index == frames[4].index
    assert len(frames) == 10
    assert report.packets_failed == 2
    assert not report.complete
    assert "image files that failed: 2" in report.said
    assert "frame5.bmp: not an image" in report.said


@pytest.mark.parametrize(("exif", "turns"), [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_exif_orientation(tmp_path: Path, exif: int, turns: int) -> None:
    stored = Image.fromarray(picture(0, 64, 32))
    tags = Image.Exif()
    tags[0x0112] = exif
    stored.save(tmp_path / "photo.png", exif=tags)
    with open_source(tmp_path / "photo.png") as source:
        frame = next(source.read(Uniform(1)))
        assert frame.image.shape == (source.info.height, source.info.width, 3)
    assert np.array_equal(frame.image, np.rot90(picture(0, 64, 32), turns))


def test_other_colour_modes(tmp_path: Path) -> None:
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(grey).save(tmp_path / "1.png")
    Image.fromarray(np.full((8, 8, 4), (255, 0, 0, 0), np.uint8)).save(tmp_path / "2.png")
    Image.fromarray(np.full((8, 8), 7, np.uint8)).convert("P").save(tmp_path / "3.png")
    with open_source(tmp_path) as source:
        deep, clear, indexed = source.read(Fps(1))
    assert np.array_equal(deep.image[..., 0], grey >> 8)
    assert clear.image.max() == 0
    assert indexed.image.min() == indexed.image.max() == 7


def test_images_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tmp_path / "bad.png"
    bad.write_text("no")
    with pytest.raises(SourceError, match="not one of 1 images can be opened"):
        open_source(bad)
    with pytest.raises(SourceError, match="not one of 1 images can be opened"):
        open_source(tmp_path)
    Image.new("1", (9000, 8000)).save(tmp_path / "huge.png")
    with pytest.raises(SourceError, match="9000x8000 pixels; at most 67,108,864"):
        open_source(tmp_path / "huge.png")


def test_natural_order() -> None:
    names = ["b1", "a10", "a2", "A1", "a02", "10", "9", ""]
    assert sorted(names, key=natural_key) == ["", "9", "10", "A1", "a02", "a2", "a10", "b1"]
