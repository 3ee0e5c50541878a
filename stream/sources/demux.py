"""Packets and pictures out of a container, going on past what is damaged."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition

from stream.errors import SourceError

from .base import MAX_PIXELS, SourceInfo, Tally, reason_of, refuse_oversize
from .pictures import Orientation, orientation_of
from .sampling import Times

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.video.stream import VideoStream

_NOT_PICTURES = ("tty", "hls", "concat", "dash", "bin", "xbin", "idf", "adf")
_STATE_DURATION = ("mov", "matroska", "avi", "flv", "asf")
_READ_ERRORS_IN_A_ROW = 64
_SHORT_BY_S = 0.5


class Damaged(Exception):
    """A strict reading met something that is not as it should be."""


def open_container(file: Any, name: str) -> InputContainer:
    """`file` (a path or a readable object) as a container; SourceError if it is not a video."""
    try:
        container = av.open(file, metadata_errors="replace")
    except (av.FFmpegError, ValueError, UnicodeError) as error:
        raise SourceError(
            f"{name} {_unreadable(file)} ({reason_of(error)}). A whole video file is needed: "
            "mp4, mov, mkv, webm, avi, ts and their like. Get it again."
        ) from None
    if container.format.name in _NOT_PICTURES:
        what = container.format.name
        container.close()
        raise SourceError(
            f"{name} is text or a playlist (read as {what!r}), not a video; give the video itself."
        )
    return container


def video_stream(container: InputContainer, name: str, *, threads: bool) -> VideoStream:
    """The main video stream, ready to decode; SourceError if there is none.

    threads: faster; but damage then costs neighbouring pictures too.
    """
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
        raise SourceError(
            f"{name} has no video stream (it holds {kinds}); give a file with pictures in it."
        )
    best = container.streams.best("video")
    stream = best if best in streams else streams[0]
    if stream.codec_context is None:
        raise SourceError(
            f"{name} is coded in a way this build of FFmpeg cannot decode; convert it to h264."
        )
    refuse_oversize(name, stream.width, stream.height)
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    if threads:
        stream.thread_type = "AUTO"
    else:
        stream.thread_count = 1
    return stream


def packets(container: InputContainer, tally: Tally) -> Iterator[Packet]:
    """All packets; those that cannot be read are counted and passed over."""
    in_a_row = 0
    while in_a_row < _READ_ERRORS_IN_A_ROW:
        try:
            for packet in container.demux():
                in_a_row = 0
                if packet.pts is not None:
                    end = (packet.pts + (packet.duration or 0)) * packet.time_base
                    tally.end_s = max(tally.end_s, float(end))
                yield packet
            return
        except av.FFmpegError as error:
            in_a_row += 1
            tally.fail(f"reading: {reason_of(error)}")
    tally.truncated = f"reading was given up after {in_a_row} errors in a row"


def pictures(
    container: InputContainer, stream: VideoStream, tally: Tally, *, strict: bool = False
) -> Iterator[VideoFrame]:
    """Every picture that can be decoded, in order of presentation.

    A packet that fails, or a picture that is whole only in part, is counted in `tally`; with
    `strict` it raises Damaged instead.
    """
    name = container.name
    for packet in packets(container, tally):
        if strict and tally.packets_failed:
            raise Damaged
        if packet.stream is not stream or (packet.size == 0 and packet.dts is not None):
            continue
        try:
            frames = stream.decode(packet)
        except av.FFmpegError as error:
            if strict:
                raise Damaged from error
            tally.fail(f"decoding: {reason_of(error)}")
            continue
        for frame in frames:
            refuse_oversize(name, frame.width, frame.height)
            if frame.is_corrupt and strict:
                raise Damaged
            tally.frames_decoded += 1
            tally.frames_patched += frame.is_corrupt
            yield frame


@dataclass(frozen=True, slots=True)
class Timeline:
    """When each frame of a file is shown, learned from its packets without decoding.

    pts: int64 [n], ascending, in units of `time_base`; pts_s: the same in seconds.
    keyframes: int64, indices into `pts` where decoding can start.
    stated_pts: False where packets carry no times and `pts` merely counts frames.
    16 bytes a frame, 1.4 MiB an hour at 24 frames a second, are all that grows with a file.
    """

    pts: np.ndarray[Any, np.dtype[np.int64]]
    pts_s: Times
    keyframes: np.ndarray[Any, np.dtype[np.int64]]
    stated_pts: bool

    def __len__(self) -> int:
        return len(self.pts)

    def index_of(self, frame: VideoFrame, counted: int) -> int:
        """The place of a decoded frame; `counted`: how many were decoded before it."""
        if not self.stated_pts or frame.pts is None:
            return counted
        return max(0, int(np.searchsorted(self.pts, frame.pts, side="right")) - 1)


def scan(container: InputContainer, stream: VideoStream, tally: Tally) -> Timeline:
    """Read all packets of a container once, decoding none."""
    pts, keys = array("q"), array("q")
    stated_pts, count = True, 0
    for packet in packets(container, tally):
        if packet.size == 0:
            continue
        if packet.stream is not stream or packet.is_discard:
            continue
        stated_pts &= packet.pts is not None
        if packet.pts is not None:
            pts.append(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
        count += 1
    base: Fraction = stream.time_base or Fraction(1, 1000)
    if stated_pts:
        times = np.unique(np.frombuffer(pts, np.int64)) if count else np.empty(0, np.int64)
        keyframes = np.searchsorted(times, np.unique(np.frombuffer(keys, np.int64)) if keys else [])
        seconds = times * base.numerator / base.denominator
    else:
        times, keyframes = np.arange(count), np.empty(0, np.int64)
        seconds = times / float(stream.guessed_rate or stream.average_rate or 25)
        tally.notes.append("the file states no presentation times; frames are spaced evenly")
    say_if_short(container, tally)
    return Timeline(times, seconds, keyframes, stated_pts)


def say_if_short(container: InputContainer, tally: Tally) -> None:
    """Once all packets were read: mark the input as cut short if its header states more."""
    if container.duration and container.format.name.startswith(_STATE_DURATION):
        have_s = tally.end_s - (container.start_time or 0) / av.time_base
        missing_s = container.duration / av.time_base - have_s
        if missing_s > _SHORT_BY_S:
            tally.truncated = f"cut short: the header states {missing_s:.1f} s more than there is"


def describe(
    container: InputContainer, stream: VideoStream, first: VideoFrame | None, name: str
) -> tuple[SourceInfo, Orientation]:
    """What the header states, and the orientation, which the first picture tells."""
    duration_s = None
    if stream.duration and stream.time_base:
        duration_s = float(stream.duration * stream.time_base)
    elif container.duration:
        duration_s = container.duration / av.time_base
    fps = float(stream.average_rate) if stream.average_rate else None
    frames = stream.frames or (round(duration_s * fps) if duration_s and fps else None)
    upright = orientation_of(first) if first is not None else Orientation()
    width, height = (first or stream).width, (first or stream).height
    if upright.turns % 2:
        width, height = height, width
    codec = stream.codec_context.name
    turned_deg = 90 * upright.turns
    return SourceInfo(name, width, height, duration_s, frames, fps, codec, turned_deg), upright


def _unreadable(file: Any) -> str:
    """What is wrong with an input that FFmpeg does not open."""
    if isinstance(file, str):
        with open(file, "rb") as opened:
            if opened.read(8)[4:] == b"ftyp":
                return "is an mp4 or mov without its index, which is written last: it was cut short"
    return "is not a video that can be opened"
