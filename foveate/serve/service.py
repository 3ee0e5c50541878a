"""What the server consists of, put together before it listens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from policies.graphs.wanted import Capture
from policies.reasoner import VideoReasoner
from stream.config import Config
from stream.live.session import Session
from stream.live.values import StreamConfig
from stream.reducers.base import Reducer
from stream.sources.live_values import LiveSettings

from .answering import Answerer
from .limits import Limits, Places
from .media import Reader
from .metrics import Metrics
from .streams import Streams, check_address
from .worker import Worker

_CLOSE_S = 5.0


class ServeConfig(Config):
    """The model and how it is used; see configs/serve/.

    reducer: one that acts before the language model, or no camera can be attached. retain, frames:
    of files, where a request states none. stream, source: of attached cameras. capture: as in
    AskConfig.
    """

    model: str = "tiny-video"
    reducer: str = "holitom_outer"
    settings: dict[str, Any] = Field(default_factory=dict)
    retain: float = Field(default=0.15, gt=0, le=1)
    frames: int = Field(default=32, ge=1)
    positions: Literal["keep", "renumber"] = "keep"
    capture: Capture = "auto"
    device: str | None = None
    seed: int = 0
    limits: Limits = Limits()
    stream: StreamConfig = StreamConfig()
    source: LiveSettings = LiveSettings()


@dataclass(frozen=True, slots=True)
class Access:
    """Who may ask, and what the server may touch for them.

    api_key: None lets all in who reach the server. loopback: it is reached from this machine alone.
    roots: folders whose files may be read. remote: files and cameras of the network may be
    fetched; private: from private addresses too.
    """

    api_key: str | None = None
    loopback: bool = True
    roots: Sequence[Path] = ()
    remote: bool = False
    private: bool = False


class Service:
    """Everything behind the routes."""

    def __init__(
        self,
        config: ServeConfig,
        access: Access,
        reasoner: VideoReasoner,
        reducer: Reducer,
        version: str,
    ) -> None:
        self.model = Path(config.model).name
        self.version = version
        self.retain, self.frames = config.retain, config.frames
        self.limits = config.limits
        self.api_key, self.loopback = access.api_key, access.loopback
        self.began_unix_s = int(time.time())
        self._access = access
        session = Session(reasoner, reducer)
        reader = Reader(access.roots, config.limits, remote=access.remote, private=access.private)
        self.answerer = Answerer(reasoner, reducer, session, reader, config.limits, config.seed)
        self.streams = Streams(session, config.stream, config.source, config.limits)
        self.places = Places(config.limits)
        self.metrics = Metrics(self.streams, lambda: self.places.taken)
        self.worker = Worker(self.streams.turn)

    def attach(
        self, name: str, source: str, given: dict[str, Any], *, trusted: bool = False
    ) -> Future[None]:
        """trusted: asked by whoever started the server, who may attach anything."""
        if not trusted:
            access = self._access
            check_address(source, self.limits.pixels, remote=access.remote, private=access.private)
        return self.worker.submit(partial(self.streams.attach, name, source, given))

    def close(self) -> None:
        self.worker.close(_CLOSE_S)
        self.streams.close()
