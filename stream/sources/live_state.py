"""The decisions of a live source: what to drop, when to try again, what time it is in the stream,
how the camera fares. No clock, no thread, no socket: times are given, in seconds.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .live_values import Gap, GapCause, Phase, Policy

_STILL_LEVELS = 8
_STILL_SHARE = 0.0005
_SHORTEST_STEP_S = 0.001


@dataclass(slots=True)
class Queued[T]:
    """dropped, gap: of the items dropped between the one delivered before and this one."""

    item: T
    dropped: int
    gap: Gap | None


class FrameQueue[T]:
    """Items that wait to be taken, under a drop policy."""

    def __init__(self, policy: Policy, frames: int) -> None:
        self._waits = policy == "block"
        self._frames = 1 if policy == "latest" else frames
        self._queued: deque[Queued[T]] = deque()
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._queued)

    @property
    def has_room(self) -> bool:
        """Whether the next item may be pushed; always, but for `block`."""
        return not self._waits or len(self._queued) < self._frames

    def push(self, item: T, gap: Gap | None = None) -> None:
        self._queued.append(Queued(item, 0, gap))
        if len(self._queued) > self._frames:
            oldest = self._queued.popleft()
            following = self._queued[0]
            following.dropped += oldest.dropped + 1
            if oldest.gap is not None:
                following.gap = oldest.gap + following.gap if following.gap else oldest.gap
            self.dropped += 1

    def pop(self) -> Queued[T] | None:
        return self._queued.popleft() if self._queued else None

    def clear(self) -> None:
        self._queued.clear()


class Backoff:
    """Waits that double up to a cap, each shortened by up to half at random, so that many sources
    of one server do not come back at once."""

    def __init__(self, first_s: float, cap_s: float, seed: int | None = None) -> None:
        self._first_s, self._cap_s = first_s, cap_s
        self._random = random.Random(seed)
        self._next_s = first_s

    def next_s(self) -> float:
        """How long to wait before the next attempt, seconds."""
        wait_s = self._next_s
        self._next_s = min(self._cap_s, 2 * wait_s)
        return wait_s * self._random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """An attempt succeeded."""
        self._next_s = self._first_s


class MediaClock:
    """One ascending media time out of the times that connection after connection states.

    The first picture is at the time it states. Within a connection media time goes on as stated;
    across a gap it goes on by the time that passed between arrivals.
    """

    def __init__(self, jump_s: float) -> None:
        self._jump_s = jump_s
        self._arrives_live = True
        self._stated_s: float | None = None
        self._arrival_s = 0.0
        self._pts_s: float | None = None
        self._step_s = 0.0
        self._reconnected = False
        self._form: object = None

    def connect(self, *, arrives_live: bool) -> None:
        """The next picture comes from a new connection.

        arrives_live: whether arrivals tell time; if not, a leap ahead is taken as stated.
        """
        self._arrives_live = arrives_live
        self._reconnected = self._pts_s is not None
        self._stated_s = None

    def place(
        self, stated_s: float | None, arrival_s: float, form: object = None
    ) -> tuple[float, Gap | None]:
        """The media time of the next picture, and the gap before it.

        stated_s: None where the stream states no time. form: size and pixel format.
        """
        passed_s = max(0.0, arrival_s - self._arrival_s)
        changed = self._form is not None and form != self._form
        before_s, self._arrival_s, self._form = self._stated_s, arrival_s, form
        if stated_s is None:
            stated_s = 0.0 if before_s is None else before_s + self._step_s
        self._stated_s = stated_s
        if self._pts_s is None:
            self._pts_s = stated_s
            return stated_s, None

        step_s = passed_s if before_s is None else stated_s - before_s
        causes: list[GapCause] = ["reconnect"] if self._reconnected else []
        if not self._reconnected:
            ahead = step_s > self._jump_s + 4 * self._step_s
            if step_s < -self._step_s or ahead:
                if self._step_s:
                    causes.append("jump")
                if step_s < 0 or self._arrives_live:
                    step_s = passed_s
            elif step_s > 0:
                self._step_s += (step_s - self._step_s) * (0.1 if self._step_s else 1.0)
        if changed:
            causes.append("change")
        self._reconnected = False
        self._pts_s += max(step_s, _SHORTEST_STEP_S)
        return self._pts_s, Gap(tuple(causes), max(step_s, 0.0)) if causes else None


class StillPicture:
    """Whether a picture is the same as the one that began the still run.

    Compared are samples of the picture (uint8, any shape): the same means that hardly a point
    differs by more than what a codec does to a picture at rest. The first picture of the run is
    the reference, so slow change adds up.
    """

    def __init__(self) -> None:
        self._reference: NDArray[np.uint8] | None = None

    def same(self, sample: NDArray[np.uint8]) -> bool:
        reference = self._reference
        if reference is not None and reference.shape == sample.shape:
            apart = np.maximum(reference, sample) - np.minimum(reference, sample)
            if np.count_nonzero(apart > _STILL_LEVELS) <= _STILL_SHARE * sample.size:
                return True
        self._reference = sample
        return False


@dataclass(frozen=True, slots=True)
class Connected:
    at_s: float


@dataclass(frozen=True, slots=True)
class Heard:
    """A packet came."""

    at_s: float


@dataclass(frozen=True, slots=True)
class Seen:
    """A picture was decoded. same: as the picture before."""

    at_s: float
    same: bool


@dataclass(frozen=True, slots=True)
class Lost:
    at_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class Ended:
    at_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Nothing happened; time went on."""

    at_s: float


Event = Connected | Heard | Seen | Lost | Ended | Tick


@dataclass(frozen=True, slots=True)
class Health:
    """How a camera fares.

    heard_s: when the latest packet came, None while not connected. still_s: since when the picture
    is the same, None before the first one.
    """

    phase: Phase = "connecting"
    heard_s: float | None = None
    still_s: float | None = None
    said: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    silent_s: float
    frozen_s: float


def step(health: Health, event: Event, limits: Limits) -> Health:
    """The health after an event."""
    if health.phase == "ended":
        return health
    match event:
        case Connected(at_s):
            return replace(health, phase="connecting", heard_s=at_s, said="")
        case Heard(at_s):
            phase: Phase = "connecting" if health.phase in ("silent", "lost") else health.phase
            return replace(health, phase=phase, heard_s=at_s)
        case Seen(at_s, same):
            still_s = health.still_s if same and health.still_s is not None else at_s
            for_s = at_s - still_s
            heard_s = at_s if health.heard_s is None else max(health.heard_s, at_s)
            if for_s >= limits.frozen_s:
                said = f"the same picture for {for_s:.1f} s"
                return Health("frozen", heard_s, still_s, said)
            return Health("live", heard_s, still_s, "")
        case Lost(_, reason):
            return replace(health, phase="lost", heard_s=None, said=reason)
        case Ended(_, reason):
            return replace(health, phase="ended", heard_s=None, said=reason)
        case Tick(at_s):
            if health.heard_s is None or at_s - health.heard_s < limits.silent_s:
                return health
            said = f"connected, but no packet for {at_s - health.heard_s:.1f} s"
            return replace(health, phase="silent", said=said)
