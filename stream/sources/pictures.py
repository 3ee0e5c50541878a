"""From a decoder's picture to an upright RGB array: colour matrix, range, depth, orientation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from av import VideoFrame

Picture = NDArray[np.uint8]

# Numbers of FFmpeg's AVColorSpace, AVColorRange and swscale that PyAV passes through.
_KNOWN_MATRICES = (1, 4, 5, 6, 7, 9, 10)
_BT601, _BT601_ALIAS = 5, 6
_LIMITED, _FULL = 1, 2
_BILINEAR, _NEAREST, _FULL_CHROMA, _EXACT_ROUNDING = 0x2, 0x10, 0x2000, 0x40000


class Orientation(NamedTuple):
    """How stored pictures stand upright: mirrored left to right first, if they are, and then
    turned clockwise by quarter turns, 0 to 3."""

    turns: int = 0
    mirrored: bool = False


def to_rgb(frame: VideoFrame, orientation: Orientation) -> Picture:
    """uint8 [height, width, 3], upright and contiguous.

    The colour matrix and range are those the frame states; BT.601 and limited range where it
    states none, as FFmpeg, decord and OpenCV have it. Each chroma sample covers its own pixels;
    at odd sizes, where swscale's nearest sample drifts, chroma is interpolated.
    High dynamic range is not tone-mapped, and pixels that are not square stay as stored.
    """
    even = frame.width % 2 == 0 == frame.height % 2
    matrix = frame.colorspace if frame.colorspace in _KNOWN_MATRICES else _BT601
    rgb = frame.to_ndarray(
        format="rgb24",
        # swscale takes up the matrix and range only if source and target differ.
        src_colorspace=_BT601_ALIAS if matrix == _BT601 else matrix,
        dst_colorspace=_BT601,
        src_color_range=_FULL if _is_full_range(frame) else _LIMITED,
        dst_color_range=_FULL,
        interpolation=(_NEAREST if even else _BILINEAR) | _FULL_CHROMA | _EXACT_ROUNDING,
    )
    if orientation.mirrored:
        rgb = rgb[:, ::-1]
    return np.ascontiguousarray(np.rot90(rgb, -orientation.turns), np.uint8)


def orientation_of(frame: VideoFrame) -> Orientation:
    """Read from the display matrix; an angle in between is rounded to the nearest quarter turn.

    Call it once for a video: the side data it reads keep a frame alive until garbage collection.
    """
    side_data: Any = frame.side_data
    try:
        matrix = side_data["DISPLAYMATRIX"]
    except KeyError:
        return Orientation()
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32, count=5).astype(np.float64)
    mirrored = bool(a * d - b * c < 0)
    if mirrored:
        a, b = -a, -b
    return Orientation(round(float(np.degrees(np.arctan2(b, a))) / 90) % 4, mirrored)


def _is_full_range(frame: VideoFrame) -> bool:
    if frame.color_range in (_LIMITED, _FULL):
        return bool(frame.color_range == _FULL)
    name = frame.format.name
    return frame.format.is_rgb or name.startswith(("yuvj", "gray", "pal", "mono", "ya"))
