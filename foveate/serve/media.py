"""What may be read on behalf of a request, and what it may be like.

data:      bytes in the request itself
file://    files under the allowed roots
http(s):// remote files, if allowed; private addresses only if allowed too

A file is looked at before anything of it is decoded: its kind by its content, the sizes it
declares, its length. Playlists and the like, which make FFmpeg open other files, are not known.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

import av
from PIL import Image

from stream.sources.base import Tally, without_credentials
from stream.sources.video_file import read_timeline

from .limits import Limits, Refusal
from .remote import fetch

Kind = Literal["image", "video"]

_IMAGES = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
_CONTAINERS = "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,ivf"
_FASTEST_FPS = 240


@dataclass(frozen=True, slots=True)
class Medium:
    """A picture or a video on this machine's disk. shown: its name, fit for a reply."""

    kind: Kind
    path: Path
    shown: str


class Reader:
    """roots: folders whose files may be read, with all that is in them."""

    def __init__(
        self, roots: Sequence[Path], limits: Limits, *, remote: bool, private: bool
    ) -> None:
        self._roots = [root.resolve(strict=True) for root in roots]
        self._limits = limits
        self._remote, self._private = remote, private

    def read(self, kind: Kind, url: str, target: Path, most_bytes: int) -> Medium:
        """The medium at `url`, checked. target: where bytes go that are not on the disk yet,
        `most_bytes` of them at most."""
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            target.write_bytes(_data(url, most_bytes))
            medium = Medium(kind, target, f"the {kind} in the request")
        elif scheme == "file":
            medium = Medium(kind, self._allowed(url), url)
        elif scheme in ("http", "https"):
            if not self._remote:
                raise _refused(
                    403,
                    "remote_not_allowed",
                    "This server fetches no remote files (--allow-remote lets it); send the file "
                    "as a data: URL.",
                )
            fetch(url, target, most_bytes, self._limits.request_s, self._private)
            medium = Medium(kind, target, without_credentials(url))
        else:
            raise _refused(
                400,
                "unsupported_url",
                "A url is data:TYPE;base64,..., file:///PATH under an allowed folder, "
                "http(s)://... or stream:NAME.",
            )
        self.check(medium)
        return medium

    def check(self, medium: Medium) -> None:
        """Refuse what is not of its kind or beyond the limits, from what it declares."""
        try:
            if medium.kind == "image":
                self._check_image(medium)
            else:
                self._check_video(medium)
        except (OSError, ValueError, SyntaxError, av.FFmpegError, Image.DecompressionBombError):
            known = ", ".join(_IMAGES) if medium.kind == "image" else "mp4, mov, mkv, webm, avi, ts"
            raise _refused(
                400,
                f"invalid_{medium.kind}",
                f"{medium.shown} is no {medium.kind} that can be read ({known} are).",
            ) from None

    def check_pixels(self, width: int, height: int, shown: str) -> None:
        if width * height > self._limits.pixels:
            raise _refused(
                413,
                "picture_too_large",
                f"{shown} has pictures of {width}x{height} pixels; at most "
                f"{self._limits.pixels:,} pixels are allowed. Scale it down first.",
            )

    def _check_image(self, medium: Medium) -> None:
        with Image.open(medium.path, formats=_IMAGES) as image:
            self.check_pixels(*image.size, medium.shown)

    def _check_video(self, medium: Medium) -> None:
        only = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
        with av.open(str(medium.path), options=only) as container:
            streams = container.streams.video
            if not streams:
                raise ValueError("no pictures")
            for stream in streams:
                self.check_pixels(stream.width, stream.height, medium.shown)
            declared_s = (container.duration or 0) / av.time_base
        self._check_length(declared_s, 0, medium)
        times_s = read_timeline(medium.path, Tally()).pts_s
        lasts_s = float(times_s[-1] - times_s[0]) if len(times_s) else 0.0
        self._check_length(lasts_s, len(times_s), medium)

    def _check_length(self, lasts_s: float, frames: int, medium: Medium) -> None:
        most_s = self._limits.duration_s
        if lasts_s > most_s or frames > most_s * _FASTEST_FPS:
            raise _refused(
                413,
                "video_too_long",
                f"{medium.shown} lasts {lasts_s:.0f} s (frames: {frames}); at most {most_s:g} s of "
                f"{_FASTEST_FPS} frames a second are allowed.",
            )

    def _allowed(self, url: str) -> Path:
        """The file of a file:// url, if a root holds it; the same words wherever else it is."""
        parts = urlsplit(url)
        try:
            path = Path(unquote(parts.path, errors="strict")).resolve(strict=True)
            known = parts.netloc in ("", "localhost") and path.is_file()
        except (OSError, ValueError, RuntimeError):
            known = False
        if not known or not any(path.is_relative_to(root) for root in self._roots):
            raise _refused(
                403,
                "file_not_allowed",
                "No such file under the folders that this server may read (--allow-root); write "
                "file:///ABSOLUTE/PATH.",
            )
        return path


def _data(url: str, most_bytes: int) -> bytes:
    head, comma, text = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise _refused(400, "invalid_data_url", "A data: URL here is data:TYPE;base64,DATA.")
    if len(text) * 3 // 4 > most_bytes + 2:
        raise _refused(
            413, "file_too_large", f"The data: URL holds more than {most_bytes:,} bytes."
        )
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _refused(400, "invalid_data_url", "The data: URL does not hold base64.") from None
    if not data:
        raise _refused(400, "invalid_data_url", "The data: URL holds no bytes.")
    return data


def _refused(status: int, code: str, message: str) -> Refusal:
    return Refusal(status, code, message, "messages")
