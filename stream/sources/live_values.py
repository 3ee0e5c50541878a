"""What a live source is set to, and the frozen values that it hands on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from stream.config import Config
from stream.data import Frame

Policy = Literal["latest", "drop-oldest", "block"]
"""What happens to decoded frames that nobody has taken yet: only the newest is kept, the newest few
are kept, or the source waits."""

GapCause = Literal["reconnect", "jump", "change"]
"""The connection was made anew; media time jumped; the size or pixel format changed."""

Phase = Literal["connecting", "live", "frozen", "silent", "lost", "ended"]
"""No picture yet; pictures come; they come but stay the same; nothing comes though connected; the
connection is gone and will be tried again; no more will come."""


class LiveSettings(Config):
    """How a live source behaves.

    policy: None takes what suits the address: `block` for finite inputs, else `latest`.
    queue_frames: how many frames `drop-oldest` and `block` hold; `latest` holds one.
    rtsp_transport: how an RTSP server sends its packets.
    open_timeout_s: how long one attempt to connect may take.
    silent_s: without a packet for so long a source is silent, and is connected anew.
    frozen_s: a picture that stays the same for so long is frozen.
    jump_s: media time that leaps ahead by more than this, beyond its usual step, marks a gap.
    retry_first_s, retry_cap_s: the wait before the first new attempt, and the longest one.
    """

    policy: Policy | None = None
    queue_frames: int = Field(default=8, ge=1, le=1024)
    rtsp_transport: Literal["tcp", "udp"] = "tcp"
    open_timeout_s: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    silent_s: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    frozen_s: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    jump_s: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    retry_first_s: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    retry_cap_s: float = Field(default=30.0, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _cap_is_a_cap(self) -> Self:
        if self.retry_cap_s < self.retry_first_s:
            raise ValueError(
                f"retry_cap_s is {self.retry_cap_s:g}, below retry_first_s "
                f"({self.retry_first_s:g}); it is the longest wait."
            )
        return self


@dataclass(frozen=True, slots=True)
class Gap:
    """The frame that carries this does not follow the one before it.

    causes: each cause once, in the order they came. missing_s: seconds not seen, as well as known.
    """

    causes: tuple[GapCause, ...]
    missing_s: float

    def __add__(self, later: Gap) -> Gap:
        causes = dict.fromkeys((*self.causes, *later.causes))
        return Gap(tuple(causes), self.missing_s + later.missing_s)


@dataclass(frozen=True, slots=True)
class LiveFrame:
    """A frame and how it came.

    frame: its pts_s ascends for the life of the source, and steps over a gap by the time that
        passed; its index counts decoded frames, dropped ones too.
    arrival_s: when its data was read, on `time.monotonic`, which all processes of a machine share.
        What a server sends while the connection is probed (0.2 s), or while `block` waits, is read
        later than it came.
    arrival_unix_s: the same, seconds since 1970 on the wall clock.
    dropped: frames dropped by the policy since the frame delivered before.
    gap: None if it follows on; a gap of dropped frames is passed on to the next that is delivered.
    """

    frame: Frame
    arrival_s: float
    arrival_unix_s: float
    dropped: int
    gap: Gap | None

    def age_s(self, now_s: float) -> float:
        """now_s: `time.monotonic()`."""
        return now_s - self.arrival_s


@dataclass(frozen=True, slots=True)
class Silence:
    """No frame came while a consumer waited.

    frame_age_s: since the newest frame that was decoded, None if there was none yet.
    said: why, in words, as far as it is known.
    """

    waited_s: float
    phase: Phase
    frame_age_s: float | None
    said: str


@dataclass(frozen=True, slots=True)
class End:
    """No more will come. failed: True if that is because something went wrong."""

    said: str
    failed: bool = False


@dataclass(frozen=True, slots=True)
class PhaseChange:
    at_unix_s: float
    phase: Phase
    said: str


@dataclass(frozen=True, slots=True)
class LiveStats:
    """Counts since the source was opened, and how it is now. No secret of its address is in it.

    packets: video packets read. frames_dropped: by the policy. packets_failed: not decodable.
    frame_age_s: since the newest decoded frame. last_error: why the connection was lost last.
    changes: the latest changes of phase, oldest first.
    """

    address: str
    policy: Policy
    phase: Phase
    packets: int
    packets_failed: int
    frames_decoded: int
    frames_delivered: int
    frames_dropped: int
    reconnects: int
    gaps: int
    frame_age_s: float | None
    last_error: str
    changes: tuple[PhaseChange, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"changes": [asdict(change) for change in self.changes]}
