"""Clean video files, through decord.

decord gives nothing from a damaged file: use PyAV for those. A reader must not be inherited by a
forked process (it hangs there); each reading here opens its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import decord

from stream.data import Frame
from stream.errors import SourceError

from .base import DecodeReport, Source, SourceInfo, Tally, check_start, reason_of
from .sampling import Sampling, Uniform
from .video_file import probe, read_timeline


class DecordFile(Source):
    """A clean video file on a disk; the same frames as `VideoFile` up to rounding of colours."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tally = Tally()
        self._info, upright = probe(path)
        if upright.mirrored:
            raise self._refusal("its pictures are mirrored, which decord leaves so")

    @property
    def info(self) -> SourceInfo:
        return self._info

    @property
    def report(self) -> DecodeReport:
        return self._tally.report()

    def read(self, sampling: Sampling, start: int = 0) -> Iterator[Frame]:
        """See `Source.read`. Raises SourceError as soon as decord fails on a frame."""
        self._tally = Tally()
        return self._read(sampling, check_start(start), self._tally)

    def close(self) -> None:
        """A reading owns its file and releases it when it ends."""

    def _read(self, sampling: Sampling, start: int, tally: Tally) -> Iterator[Frame]:
        decord.logging.set_level(decord.logging.QUIET)
        try:
            reader = decord.VideoReader(str(self._path), ctx=decord.cpu(0))
            count = len(reader)
        except (decord.DECORDError, RuntimeError) as error:
            raise self._refusal(reason_of(error)) from None
        pts_s = read_timeline(self._path, tally).pts_s
        if count != len(pts_s):
            raise self._refusal(f"it counts {count} frames, the file has {len(pts_s)}")
        wanted = sampling.pick(pts_s)
        if isinstance(sampling, Uniform) and len(wanted) < sampling.frames:
            tally.notes.append(f"{sampling.frames} frames asked for, the file has {len(wanted)}")
        for index in wanted[start:].tolist():
            try:
                image = reader[index].asnumpy()
            except (decord.DECORDError, RuntimeError) as error:
                raise self._refusal(reason_of(error)) from None
            if image.shape != (self._info.height, self._info.width, 3):
                raise self._refusal(f"it gives pictures of shape {image.shape}")
            tally.frames_decoded += 1
            tally.frames_given += 1
            yield Frame(image, float(pts_s[index]), index)

    def _refusal(self, reason: str) -> SourceError:
        reason = re.sub(r"^.*\.cc:\d+: (Check failed: )?", "", reason)
        return SourceError(
            f"decord cannot read {self._path} ({reason}). It reads clean files only; use the "
            "decoder pyav, which gives what can be decoded."
        )
