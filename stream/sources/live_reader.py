"""One connection to a live address, from opening it to its last picture, all on one thread."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import av
import numpy as np
from numpy.typing import NDArray

from stream.errors import SourceError

from .base import SourceInfo, Tally, reason_of, refuse_oversize
from .demux import describe, video_stream
from .live_address import Address
from .live_relay import Relay
from .live_values import LiveSettings
from .pictures import Orientation

if TYPE_CHECKING:
    from av import Packet, VideoFrame

_TIMELESS = ("mpjpeg", "mjpeg", "h264", "hevc", "image2pipe", "jpeg_pipe", "png_pipe")
"""Formats that state no times; FFmpeg makes up 25 frames a second for them."""

_SAMPLES_ACROSS = 64
_DEVICE_POLL_S = 0.005
_STDIN_POLL_S = 0.1
_BEHIND_S = 1.0
_SHORT_BY_S = 0.5
_PENDING = 256
_READ_ERRORS_IN_A_ROW = 64
_KEY_WITHIN = 300
"""Packets without a keyframe after which it is taken that the codec marks none."""


class ConnectionLost(Exception):
    """The connection gives no more; its text says why and holds no secret.

    final: it makes no sense to connect again. failed: it did not come to its proper end.
    """

    def __init__(self, reason: str, *, final: bool, failed: bool = True) -> None:
        super().__init__(reason)
        self.final, self.failed = final, failed


class Closing(Protocol):
    """`threading.Event`, as far as it is needed."""

    def is_set(self) -> bool: ...

    def wait(self, timeout: float | None = None) -> bool: ...


@dataclass(frozen=True, slots=True)
class Arrived:
    """A decoded picture. stated_s: the time the stream states for it, None if it states none.

    arrival_s, arrival_unix_s: when its packet was read, monotonic and wall clock.
    """

    picture: VideoFrame
    stated_s: float | None
    arrival_s: float
    arrival_unix_s: float
    upright: Orientation


class StdinReader:
    """Standard input, for FFmpeg to read; behaves as if it ended once closing begins."""

    name = "standard input"

    def __init__(self, closing: Closing) -> None:
        self._closing = closing
        self._fd = sys.stdin.fileno()

    def read(self, size: int) -> bytes:
        while not self._closing.is_set():
            if select.select([self._fd], [], [], _STDIN_POLL_S)[0]:
                return os.read(self._fd, size)
        return b""


class Connection:
    """Opens `address`; raises ConnectionLost if that cannot be done.

    heard: called at each video packet with its arrival time. closing: set when to stop.
    """

    def __init__(
        self,
        address: Address,
        settings: LiveSettings,
        relay: Relay | None,
        closing: Closing,
        tally: Tally,
        heard: Callable[[float], None],
    ) -> None:
        self._address, self._relay, self._closing = address, relay, closing
        self._tally, self._heard = tally, heard
        self._silent_s = settings.silent_s
        self.info: SourceInfo | None = None
        self.duration_s: float | None = None
        """Of a finite input; None for one that goes on."""
        file: Any = address.url
        if address.kind == "stdin":
            file = StdinReader(closing)
        elif address.kind == "rtsp" and relay is not None:
            file = address.through(relay.port)
        try:
            self._container = av.open(
                file,
                format=address.format,
                options=address.options(settings, relay.port if relay else None),
                timeout=(settings.open_timeout_s, settings.silent_s),
                metadata_errors="replace",
            )
        except (av.FFmpegError, ValueError, UnicodeError) as error:
            timed_out = isinstance(error, av.error.ExitError)
            limit = f"no answer within {settings.open_timeout_s:g} s"
            raise self._lost(limit if timed_out else self._why(error)) from None
        try:
            self._stream = video_stream(self._container, address.shown, threads=False)
        except SourceError as error:
            self._container.close()
            raise self._lost(str(error)) from None
        self._stream.codec_context.thread_type = "SLICE"
        self._stream.codec_context.thread_count = 2
        self._format = self._container.format.name
        if address.kind == "http" and self._container.duration:
            self.duration_s = self._container.duration / av.time_base
        self.arrives_live = address.kind in ("rtsp", "camera") or (
            address.kind == "http" and self.duration_s is None
        )
        """Whether the time of an arrival tells when it happened."""

    def close(self) -> None:
        self._container.close()

    def pictures(self, *, paced: bool) -> Iterator[Arrived]:
        """Decoded pictures until ConnectionLost, or until closing begins.

        paced: give those of a recording at the pace of their media time, too. Live segments (HLS)
        always are: they come in bursts, and reading on would only wait at their end.
        """
        bursts = self.arrives_live and self._format.startswith("hls")
        pace = Pace(self._closing) if bursts or (paced and not self.arrives_live) else None
        timeless = self.arrives_live and self._format.startswith(_TIMELESS)
        upright: Orientation | None = None
        for picture, arrival_s, arrival_unix_s in self._decoded():
            if upright is None:
                self.info, upright = describe(
                    self._container, self._stream, picture, self._address.shown
                )
            stated_s = arrival_s if timeless else self._stated_s(picture)
            if pace is not None and stated_s is not None:
                waited_s = pace.wait(stated_s)
                arrival_s, arrival_unix_s = arrival_s + waited_s, arrival_unix_s + waited_s
            yield Arrived(picture, stated_s, arrival_s, arrival_unix_s, upright)
            if self._closing.is_set():
                return

    def _stated_s(self, picture: VideoFrame) -> float | None:
        base = self._stream.time_base
        return None if picture.pts is None or base is None else float(picture.pts * base)

    def _decoded(self) -> Iterator[tuple[VideoFrame, float, float]]:
        """Pictures with the arrival of their packet; at the end those the decoder still held."""
        arrivals: dict[int | None, tuple[float, float]] = {}
        now = time.monotonic(), time.time()
        try:
            for packet in self._packets():
                arrivals[packet.pts] = now = time.monotonic(), time.time()
                if len(arrivals) > _PENDING:
                    del arrivals[next(iter(arrivals))]
                for picture in self._decode(packet):
                    yield picture, *arrivals.pop(picture.pts, now)
        except ConnectionLost:
            for picture in self._decode(None):
                yield picture, *arrivals.pop(picture.pts, now)
            raise

    def _packets(self) -> Iterator[Packet]:
        """Packets of the video, from the first keyframe on."""
        skip = 0 if self._address.kind == "lavfi" else _KEY_WITHIN
        heard_s = time.monotonic()
        media_end_s = 0.0
        in_a_row = 0
        while True:
            try:
                for packet in self._container.demux():
                    now_s = time.monotonic()
                    if packet.stream is not self._stream:
                        if now_s - heard_s > self._silent_s:
                            raise self._lost(f"sound, but no picture for {self._silent_s:g} s")
                        continue
                    if packet.size == 0:
                        continue
                    heard_s = now_s
                    self._heard(now_s)
                    if packet.pts is not None:
                        end = (packet.pts + (packet.duration or 0)) * packet.time_base
                        media_end_s = max(media_end_s, float(end))
                    skip = 0 if packet.is_keyframe else max(0, skip - 1)
                    if skip == 0:
                        yield packet
                        heard_s, in_a_row = time.monotonic(), 0
                raise self._end(media_end_s)
            except av.error.BlockingIOError:
                if self._closing.wait(_DEVICE_POLL_S):
                    return
                if time.monotonic() - heard_s > self._silent_s:
                    raise self._lost(f"no packet for {self._silent_s:g} s") from None
            except av.FFmpegError as error:
                in_a_row += 1
                if (
                    isinstance(error, av.error.InvalidDataError)
                    and in_a_row < _READ_ERRORS_IN_A_ROW
                ):
                    self._tally.fail(f"reading: {reason_of(error)}")
                    continue
                silent = time.monotonic() - heard_s >= self._silent_s
                reason = f"no packet for {self._silent_s:g} s" if silent else self._why(error)
                raise self._lost(reason) from None

    def _end(self, media_end_s: float) -> ConnectionLost:
        if self.duration_s is None:
            if self._address.comes_back:
                return self._lost("the other side ended the stream")
        else:
            start_s = (self._container.start_time or 0) / av.time_base
            missing_s = self.duration_s - (media_end_s - start_s)
            if missing_s > _SHORT_BY_S:
                return self._lost(f"cut short: {missing_s:.1f} s less than the header states")
        return ConnectionLost("it came to its end", final=True, failed=False)

    def _lost(self, reason: str) -> ConnectionLost:
        finite = self.duration_s is not None or not self._address.comes_back
        return ConnectionLost(reason, final=finite)

    def _decode(self, packet: Packet | None) -> list[VideoFrame]:
        try:
            pictures = self._stream.decode(packet)
        except av.FFmpegError as error:
            self._tally.fail(f"decoding: {reason_of(error)}")
            return []
        for picture in pictures:
            try:
                refuse_oversize(self._address.shown, picture.width, picture.height)
            except SourceError as error:
                raise self._lost(str(error)) from None
            self._tally.frames_decoded += 1
            self._tally.frames_patched += picture.is_corrupt
        return pictures

    def _why(self, error: BaseException) -> str:
        if self._relay is not None and self._relay.failure:
            return self._relay.failure
        return self._address.without_secrets(reason_of(error))


class Pace:
    """Holds pictures back until it is their time, counted from the first one."""

    def __init__(self, closing: Closing) -> None:
        self._closing = closing
        self._offset_s: float | None = None

    def wait(self, media_s: float) -> float:
        """Returns the seconds waited. After a jump, or when late, counts anew."""
        now_s = time.monotonic()
        ahead_s = 0.0 if self._offset_s is None else media_s + self._offset_s - now_s
        if self._offset_s is None or not -_BEHIND_S < ahead_s < 60.0:
            self._offset_s = now_s - media_s
            return 0.0
        if ahead_s > 0:
            self._closing.wait(ahead_s)
            return ahead_s
        return 0.0


def sample_of(picture: VideoFrame) -> NDArray[np.uint8]:
    """About 64 x 64 points of a picture's first plane, its brightness as a rule."""
    form = picture.format
    bits = form.components[0].bits
    stored = np.dtype(np.uint16 if bits > 8 else np.uint8)
    rows = np.frombuffer(picture.planes[0], stored).reshape(picture.height, -1)
    per_pixel = 1 if form.is_planar else max(1, form.padded_bits_per_pixel // 8 // stored.itemsize)
    across = picture.width * per_pixel
    down, right = max(1, picture.height // _SAMPLES_ACROSS), max(1, across // _SAMPLES_ACROSS)
    points = rows[::down, :across:right]
    return (points >> (bits - 8) if bits > 8 else points).astype(np.uint8)
