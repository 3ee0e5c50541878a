"""What an attached stream is set to, and the frozen values that it hands on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field

from stream.config import Config
from stream.data import Budget, Segment
from stream.pipeline import ReducedVideo, Reply
from stream.plan import Plan

Mode = Literal["closed", "anchor"]
"""A frame's tokens reach the model when its segment closes (true means over the segment), or at
once (the segment's first frame, then what is new in each later one)."""

Kind = Literal["gated", "gap", "part", "evicted", "forgotten"]


class StreamConfig(Config):
    """How one attached stream is reduced and remembered.

    fps: frames looked at, a second; None takes every frame.
    gate_level: a frame none of whose blocks changed by so many grey levels is not encoded; 0 lets
        every frame pass. gate_silence_s: but one passes after so long, whatever it shows.
    tau: cosine above which a patch equals the one before it (`closed`) or the one the model last
        saw (`anchor`). max_segment_frames: longest segment. A reducer that has settings of these
        names overrules them.
    lag_frames: frames wait at most about so long for a better segmentation before they are reduced
        together (`closed`); None lets all wait for a gap or the end, as an offline run does.
    anchor_share: of the bucket's capacity that a segment's first frame may take (`anchor`).
    tokens_per_s: what may reach the model; burst_s: seconds of it that can be saved up.
    window_frames: frames in the model's live window; evict: which parts leave it first.
    reanchor: how what stays moves up: `rotate` turns the cached keys, so that what stays still
        knows what it saw; `refill` computes the window anew, as if what left had never been.
    archive_mib: reduced tokens kept of what left the window, 0 keeps none.
    """

    mode: Mode = "closed"
    fps: float | None = Field(default=2.0, gt=0, le=1000)
    gate_level: float = Field(default=6.0, ge=0, le=255)
    gate_silence_s: float = Field(default=2.0, gt=0)
    tau: float = Field(default=0.8, ge=-1, le=1)
    max_segment_frames: int = Field(default=8, ge=1)
    lag_frames: int | None = Field(default=8, ge=0)
    anchor_share: float = Field(default=0.5, gt=0, le=1)
    tokens_per_s: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    burst_s: float = Field(default=16.0, gt=0, allow_inf_nan=False)
    window_frames: int = Field(default=32, ge=1)
    evict: Literal["oldest", "least_relevant"] = "oldest"
    reanchor: Literal["rotate", "refill"] = "rotate"
    archive_mib: float = Field(default=256.0, ge=0)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive frames whose reduced tokens reach the model together.

    group: parts of one group leave the window together; ascending in time within a stream.
    """

    group: int
    video: ReducedVideo

    @property
    def frames(self) -> int:
        return self.video.grid.frames

    @property
    def span_s(self) -> tuple[float, float]:
        """Presentation times of the first and the last frame."""
        return self.video.pts_s[0], self.video.pts_s[-1]


def joined(videos: Sequence[ReducedVideo]) -> ReducedVideo:
    """Reduced pieces of one stream, in time order, as one video."""
    first_frame = 0
    segments = []
    for video in videos:
        segments += [Segment(s.start + first_frame, s.stop + first_frame) for s in video.segments]
        first_frame += video.grid.frames
    grid = videos[0].grid
    return ReducedVideo(
        torch.cat([v.x for v in videos]),
        Plan.joined([v.plan for v in videos]),
        type(grid)(first_frame, grid.rows, grid.cols),
        tuple(t for v in videos for t in v.pts_s),
        Budget(sum(v.budget.tokens for v in videos)),
        tuple(segments),
    )


@dataclass(frozen=True, slots=True)
class Event:
    """Something a record of the stream must tell; `said` is plain data.

    pts_s: media time it belongs to.
    """

    stream: str
    kind: Kind
    pts_s: float
    said: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LiveReply:
    """Answers, and what they rest on.

    spans_s: presentation times of the parts the model saw, first and last of each, ascending.
    newest_pts_s: of the newest frame the model saw. newest_arrival_s: when that frame's data was
        read, on `time.monotonic`. recalled: how many of them came back from the archive.
    """

    reply: Reply
    spans_s: tuple[tuple[float, float], ...]
    newest_pts_s: float
    newest_arrival_s: float
    recalled: int = 0

    def age_s(self, now_s: float) -> float:
        """How old the newest frame behind the answer is; now_s: `time.monotonic()`."""
        return now_s - self.newest_arrival_s
