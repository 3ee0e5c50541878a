"""Live sources: cameras, network streams, FFmpeg's test pictures, standard input.

One thread owns the demuxer and the decoder. It never gives up on a source that may come back, and
never waits for a consumer unless the policy says so. Consumers `take` what there is:

    with Live("rtsp://camera.local/main") as camera:
        for got in camera:                       # LiveFrame or Silence, until the source ends
            ...

A frame becomes RGB in the thread that takes it, so dropped frames cost only their decoding.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace

from stream.data import Frame
from stream.errors import SourceError

from .base import DecodeReport, Source, SourceInfo, Tally, reason_of
from .live_address import parse_address
from .live_reader import Arrived, Connection, ConnectionLost, sample_of
from .live_relay import Relay
from .live_state import (
    Backoff,
    Connected,
    Ended,
    Event,
    FrameQueue,
    Health,
    Heard,
    Limits,
    Lost,
    MediaClock,
    Seen,
    StillPicture,
    Tick,
    step,
)
from .live_values import End, LiveFrame, LiveSettings, LiveStats, PhaseChange, Silence
from .pictures import to_rgb
from .sampling import Fps, FpsClock, Reservoir, Sampling, Uniform

CLOSE_S = 2.0
_CHANGES_KEPT = 32


@dataclass(frozen=True, slots=True)
class _Placed:
    """A decoded picture with its place in the source's life."""

    arrived: Arrived
    pts_s: float
    index: int


class Live(Source):
    """A live source; it starts connecting at once, in the background.

    Raises SourceError for an address that can never be opened. One that cannot be reached now is
    tried again for ever. Also a `Source`, so that it fits where files do: `read` once, at a rate.
    """

    def __init__(
        self, address: str, settings: LiveSettings | None = None, *, seed: int | None = None
    ) -> None:
        """seed: of the jitter between attempts to connect; None for an unforeseeable one."""
        self._address = parse_address(address)
        self.settings = settings or LiveSettings()
        self.policy = self.settings.policy or self._address.policy
        self._limits = Limits(self.settings.silent_s, self.settings.frozen_s)
        self._queue = FrameQueue[_Placed](self.policy, self.settings.queue_frames)
        self._backoff = Backoff(self.settings.retry_first_s, self.settings.retry_cap_s, seed)
        self._clock = MediaClock(self.settings.jump_s)
        self._still = StillPicture()
        self._tally = Tally()
        self._health = Health()
        self._changes: deque[PhaseChange] = deque(maxlen=_CHANGES_KEPT)
        self._end: End | None = None
        self._info: SourceInfo | None = None
        self._last_error = ""
        self._newest_s: float | None = None
        self._packets = self._decoded = self._delivered = self._connections = self._gaps = 0
        self._read_begun = self._endless = False

        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._waiting_for_room = False
        self._relay = self._make_relay()
        self._thread = threading.Thread(
            target=self._run, name=f"live {self._address.shown}", daemon=True
        )
        self._thread.start()

    def __repr__(self) -> str:
        return f"Live({self._address.shown}, {self._health.phase})"

    def take(self, timeout_s: float) -> LiveFrame | Silence | End:
        """The next frame as the policy has it; Silence if none comes in time; End after the last.

        Any thread may call it; a frame goes to one of them.
        """
        began_s = time.monotonic()
        with self._changed:
            while (queued := self._queue.pop()) is None:
                if self._end is not None:
                    return self._end
                waited_s = time.monotonic() - began_s
                if waited_s >= timeout_s:
                    return self._silence(waited_s)
                self._changed.wait(timeout_s - waited_s)
            self._delivered += 1
            self._changed.notify_all()
        placed = queued.item
        arrived = placed.arrived
        image = to_rgb(arrived.picture, arrived.upright)
        return LiveFrame(
            Frame(image, placed.pts_s, placed.index),
            arrived.arrival_s,
            arrived.arrival_unix_s,
            queued.dropped,
            queued.gap,
        )

    def __iter__(self) -> Iterator[LiveFrame | Silence]:
        """Frames until the source ends; a Silence each time none came for `silent_s`."""
        while not isinstance(got := self.take(self.settings.silent_s), End):
            yield got

    @property
    def stats(self) -> LiveStats:
        with self._changed:
            self._tick()
            age_s = None if self._newest_s is None else time.monotonic() - self._newest_s
            return LiveStats(
                self._address.shown,
                self.policy,
                self._health.phase,
                self._packets,
                self._tally.packets_failed,
                self._decoded,
                self._delivered,
                self._queue.dropped,
                max(0, self._connections - 1),
                self._gaps,
                age_s,
                self._last_error,
                tuple(self._changes),
            )

    def close(self) -> None:
        """End everything within `CLOSE_S` seconds, whatever the network does, from any thread.

        Consumers that wait get End. Frames not taken yet are let go.
        """
        self._closing.set()
        with self._changed:
            self._queue.clear()
            self._finish(End("the source was closed"))
        if self._relay is not None:
            self._relay.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_S)

    @property
    def info(self) -> SourceInfo:
        """As of the latest connection. Waits for the first picture, for one attempt to connect and
        one silence at most; raises SourceError if none comes."""
        limit_s = self.settings.open_timeout_s + self.settings.silent_s
        with self._changed:
            self._changed.wait_for(lambda: self._info or self._end, limit_s)
            if self._info is not None:
                return self._info
            why = self._end.said if self._end else self._last_error or "it says nothing"
        raise SourceError(
            f"{self._address.shown} gives no picture ({why}); check that it is on, its address, "
            "and the user and password."
        )

    @property
    def report(self) -> DecodeReport:
        """Of all connections so far."""
        with self._changed:
            notes = []
            if self._queue.dropped:
                notes.append(f"frames dropped ({self.policy}): {self._queue.dropped}")
            if self._gaps:
                notes.append(f"gaps: {self._gaps}, reconnects: {self._connections - 1}")
            ended = self._end.said if self._end and self._end.failed else None
            return replace(
                self._tally.report(),
                frames_given=self._delivered,
                notes=tuple(notes),
                truncated=ended,
            )

    def read(self, sampling: Sampling, start: int = 0) -> Iterator[Frame]:
        """See `Source.read`; but a live source is read once, from now on, until it ends.

        `Uniform`, and `Fps` with a largest count, need an end and give their frames when it comes.
        Raises SourceError if there is none to wait for, or if not one frame came.
        """
        if start or self._read_begun:
            raise SourceError(
                f"{self._address.shown} is live and is read once, from now on; what it showed "
                "before is gone. Record it to a file to read it again."
            )
        self._read_begun = True
        return self._read(sampling)

    def _read(self, sampling: Sampling) -> Iterator[Frame]:
        wants_end = isinstance(sampling, Uniform) or sampling.max_frames is not None
        if wants_end and self._goes_on():
            raise SourceError(
                f"{self._address.shown} goes on without end, so frames cannot be spread evenly "
                "over it; sample it at a rate (Fps), without a largest count."
            )
        frames = (got.frame for got in self if isinstance(got, LiveFrame))
        yield from _sampled(frames, sampling)
        if self._end is not None and self._end.failed and not self._delivered:
            raise SourceError(f"{self._address.shown} gave no picture ({self._end.said}).")

    def _goes_on(self) -> bool:
        """Whether the input has no end of its own; known once `info` is."""
        return self.info is not None and self._endless

    def _run(self) -> None:
        try:
            while not self._connect_once():
                if self._closing.wait(self._backoff.next_s()):
                    return
        except Exception as error:
            said = f"unexpected {type(error).__name__}: {reason_of(error)}"
            with self._changed:
                self._finish(End(self._address.without_secrets(said), failed=True))

    def _connect_once(self) -> bool:
        """One connection from start to end. True if it was the last one."""
        try:
            with closing(self._connection()) as connection:
                self._clock.connect(arrives_live=connection.arrives_live)
                with self._changed:
                    self._endless = connection.arrives_live
                    self._connections += 1
                    self._note(Connected(time.monotonic()))
                for arrived in connection.pictures(paced=self.policy != "block"):
                    self._deliver(arrived, connection.info)
        except ConnectionLost as lost:
            if self._closing.is_set():
                return True
            with self._changed:
                if lost.failed:
                    self._last_error = str(lost)
                self._tick()
                if lost.final:
                    self._finish(End(str(lost), lost.failed))
                else:
                    self._note(Lost(time.monotonic(), str(lost)))
            return lost.final
        return True

    def _connection(self) -> Connection:
        return Connection(
            self._address, self.settings, self._relay, self._closing, self._tally, self._heard
        )

    def _make_relay(self) -> Relay | None:
        address, limit_s = self._address, self.settings.open_timeout_s
        if address.kind == "http":
            return Relay(None, limit_s)
        if address.kind == "rtsp" and self.settings.rtsp_transport == "tcp":
            return Relay((address.host, address.port), limit_s)
        return None

    def _heard(self, at_s: float) -> None:
        with self._changed:
            self._packets += 1
            self._note(Heard(at_s))

    def _deliver(self, arrived: Arrived, info: SourceInfo | None) -> None:
        picture = arrived.picture
        form = picture.width, picture.height, picture.format.name
        pts_s, gap = self._clock.place(arrived.stated_s, arrived.arrival_s, form)
        same = self._still.same(sample_of(picture))
        with self._changed:
            self._info = info
            self._backoff.reset()
            self._newest_s = arrived.arrival_s
            index, self._decoded = self._decoded, self._decoded + 1
            self._gaps += gap is not None
            self._note(Seen(arrived.arrival_s, same))
            self._waiting_for_room = True
            self._changed.wait_for(lambda: self._queue.has_room or self._closing.is_set())
            self._waiting_for_room = False
            self._note(Heard(time.monotonic()))
            if not self._closing.is_set():
                self._queue.push(_Placed(arrived, pts_s, index), gap)
            self._changed.notify_all()

    def _note(self, event: Event) -> None:
        before, self._health = self._health, step(self._health, event, self._limits)
        if self._health.phase != before.phase:
            change = PhaseChange(time.time(), self._health.phase, self._health.said)
            self._changes.append(change)

    def _tick(self) -> None:
        if not self._waiting_for_room:
            self._note(Tick(time.monotonic()))

    def _finish(self, end: End) -> None:
        if self._end is None:
            self._end = end
            self._note(Ended(time.monotonic(), end.said))
            self._changed.notify_all()

    def _silence(self, waited_s: float) -> Silence:
        self._tick()
        age_s = None if self._newest_s is None else time.monotonic() - self._newest_s
        return Silence(waited_s, self._health.phase, age_s, self._health.said)


def _sampled(frames: Iterator[Frame], sampling: Sampling) -> Iterator[Frame]:
    """What `sampling.pick` picks, of frames that arrive one by one."""
    if isinstance(sampling, Fps):
        frames = _at_rate(frames, sampling.fps)
        if sampling.max_frames is None:
            yield from frames
            return
        count = sampling.max_frames
    else:
        count = sampling.frames
    store = Reservoir[Frame](count)
    for frame in frames:
        store.push(frame, frame.pts_s)
    yield from store.end()


def _at_rate(frames: Iterator[Frame], fps: float) -> Iterator[Frame]:
    clock = FpsClock[Frame](fps)
    for frame in frames:
        if (wanted := clock.push(frame, frame.pts_s)) is not None:
            yield wanted
    if (last := clock.end()) is not None:
        yield last
