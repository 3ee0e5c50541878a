"""Cameras that are asked for pictures: LeRobot's, a simulator's, anyone's own.

A kind of camera is a package's entry point in the group `foveate.cameras`: its name is the scheme
of the address (`lerobot:camera.yaml`), its value a function from what follows the colon to a
`Camera`.
"""

from __future__ import annotations

import time
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stream.data import Frame
from stream.errors import FoveateError, SourceError
from stream.sources.base import reason_of
from stream.sources.live_state import Backoff
from stream.sources.live_values import End, Gap, LiveFrame, LiveSettings, LiveStats, Phase, Silence

GROUP = "foveate.cameras"


class Camera(Protocol):
    """read: the picture of now, uint8 [h, w, 3], or None after the last one; it may wait for a
    period, and raises if the camera is gone. close: may be called more than once."""

    def read(self) -> NDArray[np.uint8] | None: ...

    def close(self) -> None: ...


def camera_kinds() -> dict[str, EntryPoint]:
    """Entry points by scheme."""
    return {point.name: point for point in entry_points(group=GROUP)}


def is_polled(address: str) -> bool:
    return address.partition(":")[0] in camera_kinds()


def open_camera(address: str) -> Camera:
    """Raises SourceError if the camera of this address cannot be opened."""
    kind, _, rest = address.partition(":")
    try:
        camera: Camera = camera_kinds()[kind].load()(rest)
    except FoveateError:
        raise
    except Exception as error:
        raise SourceError(f"{address} cannot be opened: {reason_of(error)}") from error
    return camera


class PolledFeed:
    """A camera as a feed: asked once a period for the picture of now, so nothing waits in a queue.

    A camera that fails is opened again for ever, after waits that double; the frame behind marks
    the gap. fps: None asks as often as frames are taken.
    """

    def __init__(self, address: str, fps: float | None, settings: LiveSettings | None) -> None:
        self._address = address
        self._period_s = 1 / fps if fps else 0.0
        settings = settings or LiveSettings()
        self._backoff = Backoff(settings.retry_first_s, settings.retry_cap_s)
        self._camera: Camera | None = open_camera(address)
        self._began_s = self._due_s = time.monotonic()
        self._newest_s: float | None = None
        self._delivered = self._dropped = self._reconnects = 0
        self._error = ""
        self._gap: Gap | None = None
        self._end: End | None = None

    def take(self, timeout_s: float) -> list[LiveFrame] | Silence | End:
        wait_s = self._due_s - time.monotonic()
        if wait_s > 0:
            time.sleep(min(wait_s, timeout_s))
        if self._end is not None:
            return self._end
        if time.monotonic() < self._due_s:
            return self._silence(timeout_s) if self._camera is None else []
        try:
            if self._camera is None:
                self._camera = open_camera(self._address)
                self._reconnects += 1
            image = self._camera.read()
        except Exception as error:
            return self._lost(reason_of(error), timeout_s)
        if image is None:
            self._end = End("the camera gave its last picture")
            return self._end
        return [self._frame(image)]

    def _frame(self, image: NDArray[np.uint8]) -> LiveFrame:
        now_s = time.monotonic()
        missed = int((now_s - self._due_s) / self._period_s) if self._period_s else 0
        self._due_s += (missed + 1) * self._period_s
        if self._gap is not None and self._newest_s is not None:
            self._gap = Gap(("reconnect",), now_s - self._newest_s)
        frame = Frame(image, now_s - self._began_s, self._delivered + self._dropped + missed)
        got = LiveFrame(frame, now_s, time.time(), missed, self._gap)
        self._delivered, self._dropped = self._delivered + 1, self._dropped + missed
        self._newest_s, self._gap, self._error = now_s, None, ""
        self._backoff.reset()
        return got

    def _lost(self, reason: str, timeout_s: float) -> Silence:
        self._release()
        self._error, self._gap = reason, Gap(("reconnect",), 0.0)
        self._due_s = time.monotonic() + self._backoff.next_s()
        return self._silence(timeout_s)

    def _silence(self, waited_s: float) -> Silence:
        return Silence(waited_s, self._phase, self._age_s, self._error)

    @property
    def _phase(self) -> Phase:
        if self._end is not None:
            return "ended"
        if self._camera is None:
            return "lost"
        return "connecting" if self._newest_s is None else "live"

    @property
    def _age_s(self) -> float | None:
        return None if self._newest_s is None else time.monotonic() - self._newest_s

    def said(self) -> dict[str, Any]:
        given = self._delivered
        return LiveStats(
            address=self._address,
            policy="latest",
            phase=self._phase,
            packets=given,
            packets_failed=0,
            frames_decoded=given,
            frames_delivered=given,
            frames_dropped=self._dropped,
            reconnects=self._reconnects,
            gaps=self._reconnects,
            frame_age_s=self._age_s,
            last_error=self._error,
            changes=(),
        ).as_dict()

    def _release(self) -> None:
        if self._camera is not None:
            self._camera.close()
        self._camera = None

    def close(self) -> None:
        self._release()
        self._end = self._end or End("the camera was closed")
