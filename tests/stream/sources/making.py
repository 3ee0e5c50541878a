"""Writes small videos, whole and damaged, for the tests of sources."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray


def picture(index: int, width: int, height: int) -> NDArray[np.uint8]:
    """A gradient with a bright block whose place tells `index`; uint8 [height, width, 3].

    Large pictures are plain grey: they are slow to draw."""
    if width * height > 10**6:
        return np.full((height, width, 3), 90, np.uint8)
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([x * 150 // width, y * 150 // height, (x + y) % 120], -1).astype(np.uint8)
    side = max(1, min(width, height) // 6)
    left = (index * 5) % max(1, width - side)
    top = (index * 3) % max(1, height - side)
    image[top : top + side, left : left + side] = (230, 200, 40)
    return image


def write_video(
    path: Path,
    frames: int = 48,
    size: tuple[int, int] = (160, 96),
    fps: int = 24,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    pts: Sequence[int] | None = None,
    container_format: str | None = None,
) -> Path:
    """A moving block; `pts` in units of 1/1000 s where given, else even at `fps`."""
    with av.open(
        str(path), "w", format=container_format, options=container_options or {}
    ) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(frames):
            image = av.VideoFrame.from_ndarray(picture(index, *size), format="rgb24")
            frame = image.reformat(format=pix_fmt)
            frame.pts = index if pts is None else pts[index]
            frame.time_base = Fraction(1, fps) if pts is None else Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_audio(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        tone = np.sin(np.arange(16000, dtype=np.float32) / 20)[None]
        frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def cut(source: Path, target: Path, share: float) -> Path:
    """The first `share` of a file's bytes."""
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * share)])
    return target


def corrupt_packets(source: Path, target: Path, numbers: Sequence[int], share: float = 1.0) -> Path:
    """A copy in which the last `share` of these packets (in decoding order) is noise."""
    data = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    noise = np.random.default_rng(7)
    for number in numbers:
        packet = packets[number]
        assert packet.pos is not None
        size = int(packet.size * share)
        end = packet.pos + packet.size
        data[end - size : end] = noise.bytes(size)
    target.write_bytes(data)
    return target


def turn(source: Path, target: Path, degrees: int, mirrored: bool = False) -> Path:
    """A copy of an mp4 whose track header asks the player to turn the picture clockwise."""
    cos, sin = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    a, b, c, d = cos, sin, -sin, cos
    if mirrored:
        a, b = -a, -b
    one = 1 << 16
    matrix = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    data = bytearray(source.read_bytes())
    header = data.index(b"tkhd")
    assert data[header + 4] == 0, "only version 0 of the track header is known here"
    data[header + 44 : header + 80] = matrix
    target.write_bytes(data)
    return target
