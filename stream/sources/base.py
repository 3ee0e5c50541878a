"""What a source of frames is, and how a path becomes one.

A source is read from the start each time `read` is called; reading twice gives the same frames.
It never raises because part of its input is damaged: what could not be had is in its report.
"""

from __future__ import annotations

import os
import re
import stat
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from stream.closing import Closing
from stream.errors import SourceError

from .sampling import Sampling

if TYPE_CHECKING:
    from stream.data import Frame

MAX_PIXELS = 8192 * 8192
"""The most pixels one frame may have; a header that states more is refused before decoding."""

PIPE_TIMEOUT_S = 30.0

DATASET_INFO = Path("meta", "info.json")
"""What makes a folder a LeRobotDataset."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

Decoder = Literal["pyav", "decord"]


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """What is known of a source before its frames are read.

    width, height: pixels of the upright picture. duration_s, frames_estimate, average_fps: as the
    header states them, None where it states nothing. rotation_deg: how far the stored pictures
    are turned clockwise to stand upright: 0, 90, 180 or 270.
    """

    name: str
    width: int
    height: int
    duration_s: float | None
    frames_estimate: int | None
    average_fps: float | None
    codec: str
    rotation_deg: int = 0


@dataclass(frozen=True, slots=True)
class DecodeReport:
    """What one reading gave and what it could not.

    frames_decoded: pictures decoded, wanted or not. frames_given: pictures handed on.
    packets_failed: packets (`unit` says when it is something else) that could not be decoded.
    frames_patched: decoded pictures in which the decoder filled in damaged parts.
    errors: the first few distinct reasons. truncated: why the input counts as cut short, None if
    it does not. notes: what else a person should know; notes alone do not make a reading partial.
    """

    frames_decoded: int = 0
    frames_given: int = 0
    packets_failed: int = 0
    frames_patched: int = 0
    errors: tuple[str, ...] = ()
    truncated: str | None = None
    notes: tuple[str, ...] = ()
    unit: str = "packets"

    @property
    def complete(self) -> bool:
        return not (self.packets_failed or self.frames_patched or self.truncated)

    @property
    def said(self) -> str:
        """Everything beside the counts, in one line; empty for a clean reading."""
        parts = list(self.notes)
        if self.packets_failed:
            parts.append(
                f"{self.unit} that failed: {self.packets_failed} ({'; '.join(self.errors)})"
            )
        if self.frames_patched:
            parts.append(f"frames damaged in part: {self.frames_patched}")
        if self.truncated:
            parts.append(self.truncated)
        return "; ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"errors": list(self.errors), "notes": list(self.notes)}


class Tally:
    """The mutable counts behind a `DecodeReport`."""

    MAX_ERRORS = 5

    def __init__(self, unit: str = "packets") -> None:
        self.unit = unit
        self.frames_given = 0
        self.start_over()
        self.truncated: str | None = None
        self.notes: list[str] = []
        self.end_s = 0.0
        """Where the last packet of any stream ends."""

    def start_over(self) -> None:
        """Forget what an abandoned decoding counted."""
        self.frames_decoded = 0
        self.packets_failed = 0
        self.frames_patched = 0
        self.errors: list[str] = []

    def fail(self, reason: str) -> None:
        self.packets_failed += 1
        if reason not in self.errors and len(self.errors) < self.MAX_ERRORS:
            self.errors.append(reason)

    def report(self) -> DecodeReport:
        return DecodeReport(
            self.frames_decoded,
            self.frames_given,
            self.packets_failed,
            self.frames_patched,
            tuple(self.errors),
            self.truncated,
            tuple(self.notes),
            self.unit,
        )


class Source(Closing):
    """A finite source of frames."""

    @property
    @abstractmethod
    def info(self) -> SourceInfo: ...

    @property
    @abstractmethod
    def report(self) -> DecodeReport:
        """Of the latest `read`, up to where it has come."""

    @abstractmethod
    def read(self, sampling: Sampling, start: int = 0) -> Iterator[Frame]:
        """The sampled frames in order of time, from the `start`-th on.

        `read(sampling, k)` gives what `list(read(sampling))[k:]` gives.
        Raises SourceError when not one frame can be had.
        """


def open_source(
    path: str | os.PathLike[str],
    decoder: Decoder = "pyav",
    *,
    timeout_s: float = PIPE_TIMEOUT_S,
) -> Source:
    """Open a folder of images, an image, a video file, a named pipe that carries a video, an
    episode of a LeRobotDataset (see `lerobot_dataset.py`), or the address of a live source (see
    `live_address.py`; `live.Live` takes settings and tells more).

    timeout_s: how long a pipe may give no data before it counts as ended.
    Raises SourceError when nothing can be read there; the text says what to do.
    """
    if decoder not in get_args(Decoder):
        raise SourceError(
            f"There is no decoder {decoder!r}; there are {', '.join(get_args(Decoder))}."
        )
    name = os.fspath(path)
    if is_live(name):
        if decoder == "decord":
            raise SourceError(
                f"{without_credentials(name)} is live, which decord cannot read; use the decoder "
                "pyav for it."
            )
        from .live import Live

        return Live(name)
    if is_dataset(name):
        from .lerobot_dataset import LeRobotEpisode

        return LeRobotEpisode(name)
    kind = _kind(name)
    if kind == "folder":
        from .images import ImageFolder

        return ImageFolder(Path(name))
    if kind == "file" and name.lower().endswith(IMAGE_SUFFIXES):
        from .images import ImageFolder

        return ImageFolder.single(Path(name))
    if decoder == "decord":
        if kind == "pipe":
            raise SourceError(
                f"{name} is a pipe, which decord cannot read; use the decoder pyav for it."
            )
        from .decord_file import DecordFile

        return DecordFile(Path(name))
    if kind == "pipe":
        from .pipe import VideoPipe

        return VideoPipe(Path(name), timeout_s)
    from .video_file import VideoFile

    return VideoFile(Path(name))


def is_live(name: str) -> bool:
    """Whether `name` is the address of a live source, well formed or not, and not a path."""
    return (
        "://" in name
        or name == "-"
        or name.startswith(("camera:", "lavfi:"))
        or re.fullmatch(r"/dev/video\d+", name) is not None
    )


def is_dataset(name: str) -> bool:
    """Whether a LeRobotDataset lies at the path before a '#'."""
    return os.path.isfile(Path(name.partition("#")[0]) / DATASET_INFO)


def without_credentials(text: str) -> str:
    """`text` with what may be secret in its addresses left out: user, password, query, and the
    values of such names as `password=` in a path.

    Where a '@' follows a bare '/', '?' or '#', any part may be a password: all of it is left out.
    """
    return _ADDRESS.sub(_public_part, text)


_ADDRESS = re.compile(r"(\w[\w+.-]*\\*://)(\S+)")
_SECRET_VALUE = re.compile(
    r"((?:user(?:name)?|login|pass(?:word|wd)?|pwd|token|key|auth|secret|sig(?:nature)?)=)[^&;/\s]*",
    re.IGNORECASE,
)


def _public_part(address: re.Match[str]) -> str:
    scheme, rest = address.groups()
    before, _, rest = rest.rpartition("@")
    if re.search("[/?#]", before):
        return f"{scheme}***"
    rest = re.split("[?#]", rest, maxsplit=1)[0]
    return scheme + _SECRET_VALUE.sub(r"\1***", rest)


def refuse_oversize(name: str, width: int, height: int) -> None:
    """Raise SourceError for a picture of more than `MAX_PIXELS` pixels."""
    if width * height > MAX_PIXELS:
        side = int(MAX_PIXELS**0.5)
        raise SourceError(
            f"{name} has pictures of {width}x{height} pixels; at most {MAX_PIXELS:,} "
            f"({side}x{side}) are allowed. Scale it down first."
        )


def check_start(start: int) -> int:
    """`start` itself, or SourceError if it is negative."""
    if start < 0:
        raise SourceError(f"start is {start}; it counts frames to leave out, so it is 0 or more.")
    return start


def _kind(name: str) -> Literal["file", "folder", "pipe"]:
    """What lies at `name`; SourceError if it is nothing that can be opened and read."""
    shown = name or "''"
    try:
        mode = os.stat(name).st_mode
        readable = os.access(name, os.R_OK)
    except FileNotFoundError:
        raise SourceError(
            f"{shown} does not exist; give the path of a video file, an image or a folder of "
            f"images. Relative paths start at {os.getcwd()}."
        ) from None
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{shown} cannot be looked up: {reason_of(error)}. Check the path and its permissions."
        ) from None
    if not readable:
        raise SourceError(
            f"{shown} may not be read by this user; ask for read permission (chmod u+r)."
        )
    if stat.S_ISDIR(mode):
        return "folder"
    if stat.S_ISREG(mode):
        if os.stat(name).st_size == 0:
            raise SourceError(
                f"{shown} is empty (0 bytes); a video or an image is needed. Get it again."
            )
        return "file"
    if stat.S_ISFIFO(mode):
        return "pipe"
    raise SourceError(
        f"{shown} is a device or socket; a video file, an image, a folder of images or a named "
        "pipe can be opened. Record it to a file first."
    )


def reason_of(error: BaseException) -> str:
    """A library's error in one short phrase, without the path it repeats."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(without_credentials(str(text)).split())[:200]
