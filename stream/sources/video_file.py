"""Video files, through PyAV.

A file is read twice: once for the times of its packets (no decoding), so that sampling is exact,
and once to decode. The decoding is first tried fast (threads across frames, jumps over keyframe
intervals without a wanted frame); at the first sign of damage the file is decoded again from its
start on one path that gives all that can be had. Frames already given are not given again.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from stream.data import Frame
from stream.errors import SourceError

from .base import DecodeReport, Source, SourceInfo, Tally, check_start
from .demux import Damaged, Timeline, describe, open_container, pictures, scan, video_stream
from .pictures import Orientation, to_rgb
from .sampling import Indices, Sampling, Uniform, Within

if TYPE_CHECKING:
    from av import VideoFrame

_JUMP_FRAMES = 64
"""A seek costs about this many decoded frames: it empties the decoder's threads."""

_SEEKS_WELL = ("mov", "matroska")


class VideoFile(Source):
    """A video file on a disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tally = Tally()
        self._readings: weakref.WeakSet[Generator[Frame]] = weakref.WeakSet()
        self._info, self._upright = probe(path)

    @property
    def info(self) -> SourceInfo:
        return self._info

    @property
    def report(self) -> DecodeReport:
        return self._tally.report()

    def read(self, sampling: Sampling | Within, start: int = 0) -> Iterator[Frame]:
        """See `Source.read`. Frame.index is the frame's place in the file's presentation order."""
        self._tally = Tally()
        reading = self._read(sampling, check_start(start), self._tally)
        self._readings.add(reading)
        return reading

    def close(self) -> None:
        """End all readings and release their files."""
        for reading in list(self._readings):
            reading.close()

    def _read(self, sampling: Sampling | Within, start: int, tally: Tally) -> Generator[Frame]:
        name = str(self._path)
        timeline = read_timeline(self._path, tally)
        wanted = sampling.pick(timeline.pts_s)
        if isinstance(sampling, Uniform) and len(wanted) < sampling.frames:
            tally.notes.append(f"{sampling.frames} frames asked for, the file has {len(wanted)}")
        given = start
        try:
            for frame in self._decode_fast(timeline, wanted[start:], tally):
                given += 1
                tally.frames_given += 1
                yield frame
            return
        except Damaged:
            tally.start_over()
        for frame in self._decode_all(timeline, wanted, given, tally):
            tally.frames_given += 1
            yield frame
        if tally.frames_decoded == 0:
            raise SourceError(
                f"{name} has {len(timeline)} video packets and not one can be decoded"
                f" ({'; '.join(tally.errors) or 'no reason given'}); get the file again."
            )
        missing = len(wanted) - start - tally.frames_given
        if missing > 0:
            tally.notes.append(f"wanted frames that could not be had: {missing} of {len(wanted)}")

    def _decode_fast(self, timeline: Timeline, wanted: Indices, tally: Tally) -> Iterator[Frame]:
        """Exactly the wanted frames, or Damaged."""
        if len(timeline) == 0:
            raise Damaged
        name = str(self._path)
        quiet = Tally()
        with closing(open_container(name, name)) as container:
            stream = video_stream(container, name, threads=True)
            jumps = timeline.stated_pts and container.format.name.startswith(_SEEKS_WELL)
            frames = pictures(container, stream, quiet, strict=True)
            following = 0
            for target in wanted.tolist():
                if jumps:
                    before = int(timeline.keyframes.searchsorted(target, side="right")) - 1
                    key = int(timeline.keyframes[before]) if before >= 0 else 0
                    if key - following >= _JUMP_FRAMES:
                        container.seek(int(timeline.pts[key]), stream=stream)
                        frames = pictures(container, stream, quiet, strict=True)
                for frame in frames:
                    index = timeline.index_of(frame, following)
                    following = index + 1
                    tally.frames_decoded = quiet.frames_decoded
                    if index >= target:
                        break
                else:
                    raise Damaged
                if index != target:
                    raise Damaged
                yield Frame(to_rgb(frame, self._upright), float(timeline.pts_s[index]), index)

    def _decode_all(
        self, timeline: Timeline, wanted: Indices, skip: int, tally: Tally
    ) -> Iterator[Frame]:
        """The wanted frames as far as they can be had, less the first `skip` of them."""
        name = str(self._path)
        with closing(open_container(name, name)) as container:
            stream = video_stream(container, name, threads=False)
            frames = pictures(container, stream, tally)
            indexed = ((timeline.index_of(frame, n), frame) for n, frame in enumerate(frames))
            for ordinal, (index, frame) in enumerate(nearest_had(indexed, wanted)):
                if ordinal >= skip:
                    yield Frame(to_rgb(frame, self._upright), float(timeline.pts_s[index]), index)


def probe(path: Path) -> tuple[SourceInfo, Orientation]:
    """Read the header and the first picture. Raises SourceError if it is not a video."""
    name = str(path)
    with closing(open_container(name, name)) as container:
        stream = video_stream(container, name, threads=False)
        first = next(pictures(container, stream, Tally()), None)
        return describe(container, stream, first, name)


def read_timeline(path: Path, tally: Tally) -> Timeline:
    """Read all packets of a file, decoding none; `tally` says if it is cut short."""
    name = str(path)
    with closing(open_container(name, name)) as container:
        return scan(container, video_stream(container, name, threads=False), tally)


def nearest_had(
    frames: Iterator[tuple[int, VideoFrame]], wanted: Indices
) -> Iterator[tuple[int, VideoFrame]]:
    """For each wanted index, that frame; where it is missing, the one decoded before it, or, if
    that one was given already, the one after it.

    Wanted indices ascend. Frames that step back in time are passed over; none is given twice.
    """
    targets = iter(wanted.tolist())
    target = next(targets, None)
    held: tuple[int, VideoFrame] | None = None
    latest = -1
    for index, frame in frames:
        if target is None or index <= latest:
            continue
        latest = index
        while held is not None and target is not None and target < index:
            yield held
            held, target = None, next(targets, None)
        if target is not None and target <= index:
            yield index, frame
            held, target = None, next(targets, None)
        else:
            held = index, frame
    if held is not None and target is not None:
        yield held
