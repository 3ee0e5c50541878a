"""Attached cameras: each has a thread that decodes; the model's thread takes what has come."""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from stream.errors import FoveateError, SourceError
from stream.live.feeds import Feed, open_feed
from stream.live.session import Session
from stream.live.values import StreamConfig
from stream.sources.base import without_credentials
from stream.sources.live_address import parse_address
from stream.sources.live_values import End, LiveFrame, LiveSettings

from .limits import Limits, Refusal
from .metrics import Quantiles

_LOG = logging.getLogger("foveate.serve")

_TEST_PICTURES = re.compile(
    r"lavfi:(?:testsrc2?|smptebars|smptehdbars|rgbtestsrc|color)"
    r"(?:=(?:(?:size=\d{1,4}x\d{1,4}|rate=\d{1,2}|duration=\d{1,6}|color=\w{1,32})(?::(?!$)|$))+)?"
)


@dataclass(slots=True)
class _Camera:
    feed: Feed
    mode: str
    lags: Quantiles = field(default_factory=Quantiles)
    segments: int = 0
    ended: str = ""
    """Why no more will come; empty while more may."""

    def end(self, said: str) -> None:
        self.ended = without_credentials(said)
        self.feed.close()


class Streams:
    """Only the model's thread attaches, detaches and turns; any may read `rows`."""

    def __init__(
        self, session: Session, config: StreamConfig, settings: LiveSettings, limits: Limits
    ) -> None:
        self._session, self._config, self._settings = session, config, settings
        self._limits = limits
        self._cameras: dict[str, _Camera] = {}
        self.stages: dict[str, Quantiles] = {}
        """Seconds of each stage of a turn."""
        self._lock = threading.Lock()
        """Held while a stream comes or goes, and by who reads all of them."""

    def __len__(self) -> int:
        return len(self._cameras)

    def attach(self, name: str, source: str, given: dict[str, Any]) -> None:
        """given: settings of the stream in place of the server's."""
        if name in self._cameras:
            raise Refusal(
                409, "stream_exists", f"A stream '{name}' is attached; detach it first.", "name"
            )
        if len(self._cameras) >= self._limits.streams:
            raise Refusal(
                429,
                "too_many_streams",
                f"{len(self._cameras)} streams are attached, which is all that may be "
                "(--max-streams); detach one.",
            )
        config = StreamConfig.model_validate(self._config.model_dump() | given)
        if config.window_frames > self._limits.frames:
            raise Refusal(
                400,
                "too_many_frames",
                f"window_frames is {config.window_frames}; at most {self._limits.frames} are "
                "allowed.",
                "window_frames",
            )
        feed = open_feed(source, config.fps, self._settings)
        try:
            with self._lock:
                self._session.attach(name, config)
                self._cameras[name] = _Camera(feed, config.mode)
        except BaseException:
            feed.close()
            raise

    def detach(self, name: str) -> None:
        self.known(name)
        with self._lock:
            camera = self._cameras.pop(name)
            self._session.detach(name)
        camera.feed.close()

    def known(self, name: str) -> None:
        """Raises Refusal if no stream has this name."""
        if name not in self._cameras:
            raise Refusal(
                404,
                "stream_not_found",
                f"No stream is named '{name}'; attached are: {', '.join(self._cameras) or 'none'}.",
            )

    def turn(self) -> bool:
        """Take in what the cameras gave since the last turn; False once none will give more."""
        arrived: dict[str, list[LiveFrame]] = {}
        for name, camera in self._cameras.items():
            if not camera.ended and (frames := self._taken(name, camera)):
                arrived[name] = frames
        if arrived:
            self._step(arrived)
        return any(not camera.ended for camera in self._cameras.values())

    def _step(self, arrived: dict[str, list[LiveFrame]]) -> None:
        before = dict(self._session.timings_ms)
        try:
            events = self._session.step(arrived)
        except Exception as error:
            _LOG.exception("the model cannot take the pictures of %s", ", ".join(arrived))
            for name in arrived:
                self._cameras[name].end(f"the model cannot take its pictures: {error}")
            return
        for stage, ms in self._session.timings_ms.items():
            self.stages.setdefault(stage, Quantiles()).add((ms - before.get(stage, 0.0)) / 1e3)
        for event in events:
            self._cameras[event.stream].segments += len(event.said.get("segments", ()))
        now_s = time.monotonic()
        for name, frames in arrived.items():
            for got in frames:
                self._cameras[name].lags.add(got.age_s(now_s))

    def rows(self) -> list[dict[str, Any]]:
        """How each stream fares, as plain data without secrets."""
        with self._lock:
            return [self._row(name, camera) for name, camera in self._cameras.items()]

    def lags(self) -> dict[str, Quantiles]:
        """Seconds from a frame's arrival until it was taken in, of each stream."""
        with self._lock:
            return {name: camera.lags for name, camera in self._cameras.items()}

    def close(self) -> None:
        for camera in self._cameras.values():
            camera.feed.close()

    def _taken(self, name: str, camera: _Camera) -> list[LiveFrame]:
        try:
            got = camera.feed.take(0.0)
        except FoveateError as error:
            got = End(str(error), failed=True)
        frames = got if isinstance(got, list) else []
        if any(math.prod(f.frame.image.shape[:2]) > self._limits.pixels for f in frames):
            got, frames = End("its pictures are too large (--max-pixels)", failed=True), []
        if isinstance(got, End):
            camera.end(got.said)
            self._session.flush(name)
        return frames

    def _row(self, name: str, camera: _Camera) -> dict[str, Any]:
        source, counts = camera.feed.said(), self._session.counts(name)
        return {
            "name": name,
            "source": source["address"],
            "phase": "ended" if camera.ended else source["phase"],
            "said": camera.ended or without_credentials(source.get("last_error", "")),
            "frame_age_s": source.get("frame_age_s"),
            "mode": camera.mode,
            "counts": {
                "frames": source.get("frames_decoded", counts.frames),
                "gated": counts.gated,
                "dropped": source.get("frames_dropped", counts.dropped),
                "encoded": counts.encoded,
                "gaps": source.get("gaps", counts.gaps),
                "reconnects": source.get("reconnects", 0),
                "segments": camera.segments,
                "tokens_in": counts.tokens_in,
                "tokens_out": counts.tokens_out,
            },
            "lag_s": camera.lags.values(),
        }


def check_address(source: str, pixels: int, *, remote: bool, private: bool) -> None:
    """What a client may have attached; whoever starts the server may attach anything.

    Webcams, files and standard input are not for clients. Of FFmpeg's filters only its test
    pictures are, since others read and write files. A network camera can lead FFmpeg to other
    addresses (playlists, redirects), so it needs access to private ones.
    """
    kind = source.partition(":")[0].lower()
    if kind == "lavfi":
        sizes = [int(w) * int(h) for w, h in re.findall(r"size=(\d+)x(\d+)", source)]
        if not _TEST_PICTURES.fullmatch(source) or not all(0 < s <= pixels for s in sizes):
            raise _refused(
                "Of lavfi: only testsrc, testsrc2, smptebars, smptehdbars, rgbtestsrc and color "
                "may be attached here, with size=WxH, rate, duration and color."
            )
    elif kind in ("rtsp", "rtsps", "http", "https"):
        if not (remote and private):
            raise _refused(
                "Cameras of the network may be attached by clients only where the server was "
                "started with --allow-remote and --allow-private, since they can lead anywhere."
            )
        try:
            parse_address(source)
        except SourceError as error:
            raise Refusal(400, "invalid_source", str(error), "source") from None
    else:
        raise _refused(
            "A client may attach rtsp://, http(s):// and lavfi: sources; others are attached by "
            "whoever starts the server: --stream NAME=SOURCE."
        )


def _refused(message: str) -> Refusal:
    return Refusal(403, "source_not_allowed", message, "source")
