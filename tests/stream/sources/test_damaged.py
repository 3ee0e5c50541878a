"""Damaged and impossible inputs: what can be had is had, the rest is said, nothing is raised but
SourceError."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stream.errors import SourceError
from stream.sources import DecodeReport, Fps, Uniform, open_source
from stream.sources.base import without_credentials
from tests.stream.sources.making import corrupt_packets, cut, picture, write_audio, write_video

EVERY = Fps(1000)


def read(path: Path) -> tuple[list[int], DecodeReport]:
    with open_source(path) as source:
        indices = [frame.index for frame in source.read(EVERY)]
        return indices, source.report


def refusal(path: Path | str) -> str:
    with pytest.raises(SourceError) as caught, open_source(path) as source:
        list(source.read(EVERY))
    text = str(caught.value)
    assert str(path) in text, "the message does not say what was given"
    return text


def test_mkv_cut_short(clean_mkv: Path, tmp_path: Path) -> None:
    indices, report = read(cut(clean_mkv, tmp_path / "cut.mkv", 0.6))
    assert indices == list(range(len(indices)))
    assert 10 < len(indices) < 40
    assert not report.complete
    assert report.truncated is not None
    assert "the header states" in report.truncated


def test_mp4_cut_short_with_its_index_in_front(front_index_mp4: Path, tmp_path: Path) -> None:
    indices, report = read(cut(front_index_mp4, tmp_path / "cut.mp4", 0.7))
    assert indices == list(range(len(indices)))
    assert 10 < len(indices) < 48
    assert report.truncated is not None


def test_mp4_cut_short_without_its_index(clean_mp4: Path, tmp_path: Path) -> None:
    text = refusal(cut(clean_mp4, tmp_path / "cut.mp4", 0.6))
    assert "without its index" in text
    assert "Get it again" in text


def test_corrupt_packets_in_the_middle(clean_mp4: Path, tmp_path: Path) -> None:
    video = corrupt_packets(clean_mp4, tmp_path / "corrupt.mp4", [10, 11, 12, 30])
    with open_source(video) as source:
        every = list(source.read(EVERY))
        report = source.report
        sampled = list(source.read(Uniform(8)))
    assert report.packets_failed == 4
    assert report.frames_decoded == len(every) == 44
    assert "packets that failed: 4 (decoding:" in report.said
    assert not report.complete
    for frame in every[:5]:
        assert np.abs(frame.image.astype(int) - picture(frame.index, 160, 96)).mean() < 5
    assert len(sampled) == 8, "missing frames are replaced by their neighbours"
    assert all(a.pts_s < b.pts_s for a, b in pairwise(sampled))


def test_packets_damaged_in_part_are_counted(clean_mp4: Path, tmp_path: Path) -> None:
    video = corrupt_packets(clean_mp4, tmp_path / "part.mp4", [20, 21], share=0.5)
    indices, report = read(video)
    assert len(indices) == 48
    assert report.frames_patched == 2
    assert "frames damaged in part: 2" in report.said
    assert not report.complete


def test_corrupt_packets_in_mkv(clean_mkv: Path, tmp_path: Path) -> None:
    indices, report = read(corrupt_packets(clean_mkv, tmp_path / "c.mkv", [20, 21], share=0.5))
    assert len(indices) == 48
    assert report.frames_patched == 2


def test_damage_at_the_end_loses_nothing_before_it(clean_mp4: Path, tmp_path: Path) -> None:
    indices, report = read(corrupt_packets(clean_mp4, tmp_path / "end.mp4", range(40, 48)))
    assert len(indices) == 40
    assert report.packets_failed == 8


def test_no_packet_can_be_decoded(clean_mp4: Path, tmp_path: Path) -> None:
    text = refusal(corrupt_packets(clean_mp4, tmp_path / "noise.mp4", range(48)))
    assert "48 video packets and not one can be decoded" in text


@pytest.mark.parametrize("start", [0, 3, 7])
def test_a_damaged_file_resumes_too(clean_mp4: Path, tmp_path: Path, start: int) -> None:
    video = corrupt_packets(clean_mp4, tmp_path / "corrupt.mp4", [10, 11, 12, 30])
    with open_source(video) as source:
        whole = list(source.read(Uniform(8)))
        rest = list(source.read(Uniform(8), start))
    assert [frame.index for frame in rest] == [frame.index for frame in whole[start:]]
    for first, second in zip(whole[start:], rest, strict=True):
        assert np.array_equal(first.image, second.image)


def test_one_frame(tmp_path: Path) -> None:
    indices, report = read(write_video(tmp_path / "one.mp4", frames=1))
    assert indices == [0]
    assert report.complete


def test_what_is_not_a_video(tmp_path: Path) -> None:
    empty, text, long_text = (tmp_path / name for name in ("empty.mp4", "a.mp4", "long.txt"))
    empty.touch()
    text.write_text("not a video\n")
    long_text.write_text("still not a video, but long enough to look like a terminal log\n" * 200)
    assert "is empty (0 bytes)" in refusal(empty)
    assert "is not a video that can be opened" in refusal(text)
    assert "is text or a playlist" in refusal(long_text)
    assert "no video stream (it holds audio)" in refusal(write_audio(tmp_path / "song.m4a"))
    assert "does not exist" in refusal(tmp_path / "missing.mp4")
    assert "is a device or socket" in refusal("/dev/null")
    assert "folder with no images among its 3 files" in refusal(tmp_path_with_files(tmp_path))


def tmp_path_with_files(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.txt", "b.mp4", "c"):
        (folder / name).write_text("x")
    return folder


def test_permission_denied(clean_mp4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "may not be read by this user" in refusal(clean_mp4)


def test_a_path_that_cannot_be() -> None:
    assert "cannot be looked up" in refusal("a" * 5000)
    with pytest.raises(SourceError, match="cannot be looked up"):
        open_source("a\0b")


def test_an_unknown_decoder(clean_mp4: Path) -> None:
    with pytest.raises(SourceError, match="no decoder 'gpu'; there are pyav, decord"):
        open_source(clean_mp4, decoder="gpu")  # type: ignore[arg-type]


def test_addresses_are_refused_without_their_secrets() -> None:
    with pytest.raises(SourceError) as caught:
        open_source("ftp://user:hunter2@camera.local:554/main?token=hunter3")
    assert "ftp://camera.local:554/main is an address of a kind" in str(caught.value)
    assert "hunter" not in str(caught.value)


@pytest.mark.parametrize(
    ("given_text", "shown"),
    [
        ("http://a:b@h/x", "http://h/x"),
        ("http://a:p@ss@h/x?k=v#f", "http://h/x"),
        ("two http://u@h and rtsp://v:w@k/z?t=1 end", "two http://h and rtsp://k/z end"),
        ("/plain/path@2x.mp4?", "/plain/path@2x.mp4?"),
    ],
)
def test_without_credentials(given_text: str, shown: str) -> None:
    assert without_credentials(given_text) == shown


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(["clean.mp4", "clean.mkv", "front.mp4"]))
def test_any_damage_gives_frames_in_order_or_a_source_error(
    clean_mp4: Path, clean_mkv: Path, front_index_mp4: Path, data: st.DataObject, name: str
) -> None:
    whole = bytearray((clean_mp4.parent / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0, len(whole) - 1))
        size = data.draw(st.integers(1, 60))
        if data.draw(st.booleans()):
            whole[place : place + size] = np.random.default_rng(place).bytes(size)
        else:
            del whole[place : place + size]
    damaged = clean_mp4.parent / f"damaged.{name}"
    damaged.write_bytes(whole)
    try:
        with open_source(damaged) as source:
            every = [frame.index for frame in source.read(Uniform(8))]
            rest = [frame.index for frame in source.read(Uniform(8), 2)]
    except SourceError:
        return
    assert every == sorted(set(every))
    assert len(every) <= 8
    assert rest == every[2:]
