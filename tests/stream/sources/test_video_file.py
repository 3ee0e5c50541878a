"""Video files that are whole: exact frames, times, colours, orientation, resuming, releasing."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import av
import numpy as np
import pytest

from stream.data import Frame
from stream.errors import SourceError
from stream.sources import Fps, Sampling, Uniform, open_source, video_file
from tests.stream.sources.making import picture, turn, write_video

DATA = Path(__file__).parents[2] / "data"
EVERY = Fps(1000)


def read(path: Path, sampling: Sampling, start: int = 0) -> list[Frame]:
    with open_source(path) as source:
        return list(source.read(sampling, start))


def same(first: list[Frame], second: list[Frame]) -> bool:
    return [(f.index, f.pts_s) for f in first] == [(f.index, f.pts_s) for f in second] and all(
        np.array_equal(a.image, b.image) for a, b in zip(first, second, strict=True)
    )


def test_every_frame_at_its_time(clean_mp4: Path) -> None:
    frames = read(clean_mp4, EVERY)
    assert [frame.index for frame in frames] == list(range(48))
    assert [frame.pts_s for frame in frames] == pytest.approx(np.arange(48) / 24)
    for frame in frames:
        error = np.abs(frame.image.astype(int) - picture(frame.index, 160, 96))
        assert error.mean() < 5, f"{frame} does not show the picture that was written"


def test_info_and_report(clean_mp4: Path) -> None:
    with open_source(clean_mp4) as source:
        info = source.info
        assert (info.width, info.height, info.codec, info.rotation_deg) == (160, 96, "h264", 0)
        assert (info.frames_estimate, info.average_fps) == (48, 24)
        assert info.duration_s == pytest.approx(2)
        assert len(list(source.read(Uniform(5)))) == 5
        report = source.report
    assert report.complete
    assert report.said == ""
    assert (report.frames_decoded, report.frames_given) == (48, 5)
    assert report.as_dict()["errors"] == []


def test_fewer_frames_than_asked_for_is_said(clean_mp4: Path) -> None:
    with open_source(clean_mp4) as source:
        assert len(list(source.read(Uniform(64)))) == 48
        assert "64 frames asked for, the file has 48" in source.report.said
        assert source.report.complete


def test_variable_frame_rate_is_sampled_by_time(tmp_path: Path) -> None:
    pts_ms = [0, 40, 80, 1000, 3000, 3040, 3080, 6000, 6040, 8000]
    video = write_video(tmp_path / "vfr.mp4", frames=10, pts=pts_ms, options={"bf": "0"})
    assert [round(f.pts_s * 1000) for f in read(video, EVERY)] == pts_ms
    assert [f.index for f in read(video, Fps(1))] == [0, 3, 4, 6, 7, 8, 9]
    assert [f.index for f in read(video, Uniform(3))] == [0, 6, 9]


@pytest.mark.parametrize("sampling", [Uniform(7), Fps(5), Fps(12, max_frames=6)])
@pytest.mark.parametrize("start", [0, 1, 4, 6, 99])
def test_a_reading_resumes_where_it_is_told(
    clean_mp4: Path, sampling: Sampling, start: int
) -> None:
    assert same(read(clean_mp4, sampling, start), read(clean_mp4, sampling)[start:])


def test_a_negative_start_is_refused(clean_mp4: Path) -> None:
    with open_source(clean_mp4) as source, pytest.raises(SourceError, match="start is -1"):
        source.read(Uniform(2), -1)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("gop", ["keyint=12", "keyint=30:open-gop=1", "keyint=400"])
def test_jumping_to_keyframes_equals_plain_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, gop: str
) -> None:
    options = {"preset": "veryfast", "x264-params": gop}
    video = write_video(tmp_path / f"v.{suffix}", frames=200, size=(64, 48), options=options)
    monkeypatch.setattr(video_file, "_JUMP_FRAMES", 10**9)
    plain = [read(video, sampling) for sampling in (Uniform(6), Fps(0.5), Uniform(40))]
    monkeypatch.setattr(video_file, "_JUMP_FRAMES", 1)
    with open_source(video) as source:
        jumping = [list(source.read(s)) for s in (Uniform(6), Fps(0.5), Uniform(40))]
        list(source.read(Uniform(2)))
        if gop == "keyint=12":
            assert source.report.frames_decoded < 100, "nothing was jumped over"
    assert all(same(a, b) for a, b in zip(plain, jumping, strict=True))


@pytest.mark.parametrize(
    ("codec", "pix_fmt"), [("ffv1", "yuv444p"), ("ffv1", "yuv420p"), ("png", "rgb24")]
)
@pytest.mark.parametrize("size", [(1, 1), (161, 97), (3, 200)])
def test_any_size(tmp_path: Path, size: tuple[int, int], codec: str, pix_fmt: str) -> None:
    name = "v.mov" if codec == "png" else "v.mkv"
    video = write_video(tmp_path / name, 3, size, codec=codec, pix_fmt=pix_fmt)
    frames = read(video, EVERY)
    assert [frame.image.shape for frame in frames] == [(size[1], size[0], 3)] * 3
    error = np.abs(frames[1].image.astype(int) - picture(1, *size))
    assert error.mean() < {"rgb24": 1e-9, "yuv444p": 3, "yuv420p": 60}[pix_fmt]


def test_8k_is_read_and_more_is_refused(tmp_path: Path) -> None:
    wide = write_video(tmp_path / "8k.mp4", 1, (7680, 4320), options={"preset": "ultrafast"})
    assert read(wide, Uniform(4))[0].image.shape == (4320, 7680, 3)
    wider = write_video(tmp_path / "9k.avi", 1, (9000, 8000), codec="mjpeg", pix_fmt="yuvj420p")
    with pytest.raises(SourceError, match="9000x8000 pixels; at most 67,108,864"):
        open_source(wider)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_pictures_stand_upright(
    clean_mp4: Path, tmp_path: Path, degrees: int, mirrored: bool
) -> None:
    turned = turn(clean_mp4, tmp_path / "turned.mp4", degrees, mirrored)
    with open_source(turned) as source:
        info = source.info
        frames = list(source.read(Uniform(3)))
    assert info.rotation_deg == degrees
    for stored, upright in zip(read(clean_mp4, Uniform(3)), frames, strict=True):
        flipped = stored.image[:, ::-1] if mirrored else stored.image
        assert np.array_equal(upright.image, np.rot90(flipped, -degrees // 90))
        assert upright.image.shape == (info.height, info.width, 3)


# Coefficients of red and blue in luma, by the number that FFmpeg gives the matrix.
MATRICES = {1: (0.2126, 0.0722), 2: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv444p10le"])
def test_colours_follow_the_stated_matrix_and_range(
    tmp_path: Path, matrix: int, full_range: bool, pix_fmt: str
) -> None:
    video = tmp_path / "colours.mkv"
    yuv8 = np.random.default_rng(0).integers(60, 190, (3, 24, 32))
    depth = 10 if "10" in pix_fmt else 8
    with av.open(str(video), "w") as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.width, stream.height, stream.pix_fmt = 32, 24, pix_fmt
        stream.codec_context.colorspace = matrix
        stream.codec_context.color_range = 2 if full_range else 1
        frame = av.VideoFrame(32, 24, pix_fmt)
        frame.colorspace, frame.color_range = matrix, 2 if full_range else 1
        for plane, values in zip(frame.planes, yuv8, strict=True):
            kind = np.uint16 if depth == 10 else np.uint8
            padded = np.zeros((24, plane.line_size // np.dtype(kind).itemsize), kind)
            padded[:, :32] = values << (depth - 8)
            plane.update(padded.tobytes())
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    luma, blue, red = yuv8.astype(float)
    if full_range:
        luma, blue, red = luma / 255, (blue - 128) / 255, (red - 128) / 255
    else:
        luma, blue, red = (luma - 16) / 219, (blue - 128) / 224, (red - 128) / 224
    of_red, of_blue = MATRICES[matrix]
    r, b = luma + 2 * (1 - of_red) * red, luma + 2 * (1 - of_blue) * blue
    g = (luma - of_red * r - of_blue * b) / (1 - of_red - of_blue)
    expected = np.clip(np.stack([r, g, b], -1) * 255, 0, 255)
    assert np.abs(read(video, EVERY)[0].image - expected).max() < 2


def test_a_real_10_bit_file() -> None:
    frames = read(DATA / "h264_10bits.mp4", Uniform(4))
    assert [frame.index for frame in frames] == [0, 9, 19, 29]
    assert all(frame.image.shape == (200, 200, 3) for frame in frames)


@pytest.mark.parametrize("name", ["raw.h264", "v.ts", "v.avi", "v.gif", "v.webm"])
def test_other_containers(tmp_path: Path, name: str) -> None:
    codec, pix_fmt = {
        "v.avi": ("mpeg4", "yuv420p"),
        "v.gif": ("gif", "rgb8"),
        "v.webm": ("libvpx", "yuv420p"),
    }.get(name, ("libx264", "yuv420p"))
    kind = "h264" if name == "raw.h264" else None
    video = write_video(tmp_path / name, 20, (64, 48), 20, codec, pix_fmt, container_format=kind)
    frames = read(video, EVERY)
    assert [frame.index for frame in frames] == list(range(20))
    assert np.diff([frame.pts_s for frame in frames]) == pytest.approx(np.full(19, 0.05))
    assert len(read(video, Uniform(6))) == 6


def test_a_cover_picture_is_not_a_video(tmp_path: Path) -> None:
    song = tmp_path / "song.mp4"
    with av.open(str(song), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic.value
        tone = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        image = av.VideoFrame.from_ndarray(picture(0, 32, 32)).reformat(format="yuvj420p")
        container.mux(cover.encode(image))
        container.mux(cover.encode(None))
        container.mux(tone.encode(frame))
        container.mux(tone.encode(None))
    with pytest.raises(SourceError, match="no video stream"):
        open_source(song)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files through /proc")
def test_leaving_early_releases_the_file(clean_mp4: Path) -> None:
    gc.collect()
    before = open_files()
    source = open_source(clean_mp4)
    assert open_files() == before, "an idle source holds its file"
    reading = source.read(EVERY)
    next(reading)
    assert open_files() == before + 1
    source.close()
    assert open_files() == before
    assert next(reading, None) is None

    def interrupted() -> None:
        with open_source(clean_mp4) as source:
            for _ in source.read(EVERY):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert open_files() == before


def test_unwanted_frames_are_not_converted(
    clean_mp4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = []
    convert = video_file.to_rgb
    monkeypatch.setattr(
        video_file, "to_rgb", lambda frame, *rest: converted.append(1) or convert(frame, *rest)
    )
    assert len(read(clean_mp4, Uniform(4), start=1)) == len(converted) == 3
