"""The state machine of one attached stream: frames in, parts and events out. No clock, no model,
no thread.

    offer(frame)    -> a frame to encode, or None
    accept(encoded) -> the parts that reach the model now
    tail()          -> what waits, reduced as if its segment closed now; changes nothing
    flush()         -> what waits, for good: at a gap or at the end
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from stream.data import Budget, Frame, Segment
from stream.errors import ConfigError
from stream.memory import Memory
from stream.pipeline import EncodedVideo, ReducedVideo, reduce_video
from stream.reducers.base import Reducer
from stream.sources.live_values import Gap, LiveFrame

from .budget_bucket import TokenBucket
from .gate import FrameClock, PixelGate
from .news import LastSeen
from .segments import OpenFrames, Ready
from .values import Event, Kind, Part, StreamConfig

_NOVELTY_S = 5.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """A frame to encode. gap: before it, None if it follows on."""

    frame: Frame
    arrival_s: float
    gap: Gap | None


@dataclass(frozen=True, slots=True)
class Counts:
    """Since the stream was attached. tokens_in: patches encoded; tokens_out: what reached the
    model."""

    frames: int = 0
    dropped: int = 0
    skipped: int = 0
    gated: int = 0
    encoded: int = 0
    gaps: int = 0
    parts: int = 0
    tokens_in: int = 0
    tokens_out: int = 0


class StreamEngine:
    """One stream. Pure: what it does depends on what it was given, in order, alone.

    reducer: acts before the language model; a stream is prefilled before there is a question.
    """

    def __init__(self, name: str, config: StreamConfig, reducer: Reducer) -> None:
        inside = [type(s).__name__ for s in reducer.stages if s.site.in_llm]
        if inside:
            raise ConfigError(
                f"{', '.join(inside)} acts inside the language model, where its choice depends on "
                "the question, but a stream is prefilled before it is asked. Take a reducer that "
                "acts before the model: holitom_outer, saliency, uniform ..."
            )
        if getattr(reducer, "tau_quantile", None) is not None:
            raise ConfigError(
                "tau_quantile needs the whole video, which a stream never has; set tau instead."
            )
        self.name, self.config, self._reducer = name, config, reducer
        tau = getattr(reducer, "tau", config.tau)
        longest = getattr(reducer, "max_segment_frames", config.max_segment_frames)
        self._clock = FrameClock(config.fps) if config.fps else None
        self._gate = PixelGate(config.gate_level, config.gate_silence_s)
        self._open = OpenFrames(tau, longest, config.lag_frames)
        self._seen = LastSeen(tau, longest)
        self.bucket = TokenBucket(config.tokens_per_s, config.burst_s)
        self._memory = Memory(seed=config.seed)
        self._gap: Gap | None = None
        self._offered_s: float | None = None
        self._accepted_s: float | None = None
        self._group = -1
        self.novelty = 0.0
        """Share of patches that change from frame to frame, over the last seconds."""
        self.newest_s: tuple[float, float] | None = None
        """(presentation, arrival) time of the newest frame that was gated or encoded."""
        self.counts = Counts()
        self.events: list[Event] = []
        """What happened, for a record; whoever reads it clears it."""

    def offer(self, got: LiveFrame) -> Wanted | None:
        """The frame, if it is to be encoded: wanted by the rate, and changed or long awaited."""
        counts, pts_s = self.counts, got.frame.pts_s
        self.counts = replace(
            counts, frames=counts.frames + 1, dropped=counts.dropped + got.dropped
        )
        if got.gap is not None:
            self._gap = got.gap if self._gap is None else self._gap + got.gap
            self._gate.reset()
        if self._clock is not None and not self._clock.wants(pts_s) and self._gap is None:
            self.counts = replace(self.counts, skipped=counts.skipped + 1)
            return None
        if not self._gate.passes(got.frame.image, pts_s):
            self.counts = replace(self.counts, gated=counts.gated + 1)
            self._renew(0.0, pts_s)
            self.newest_s = pts_s, got.arrival_s
            self.note("gated", pts_s)
            return None
        gap, self._gap = self._gap, None
        return Wanted(got.frame, got.arrival_s, gap)

    def accept(self, encoded: EncodedVideo, gap: Gap | None = None) -> list[Part]:
        """The next grid frame, encoded. gap: before it; closes what waits."""
        parts = []
        pts_s = encoded.pts_s[0]
        if gap is not None:
            self.counts = replace(self.counts, gaps=self.counts.gaps + 1)
            self.note("gap", pts_s, causes=list(gap.causes), missing_s=gap.missing_s)
            parts = self.flush()
        first_s = 1 / self.config.fps if self.config.fps else 0.0
        seconds = first_s if self._accepted_s is None else pts_s - self._accepted_s
        self._accepted_s = pts_s
        counts = self.counts
        self.counts = replace(
            counts,
            encoded=counts.encoded + 1,
            tokens_in=counts.tokens_in + encoded.grid.size,
        )
        if self.config.mode == "anchor":
            self.bucket.earn(seconds)
            part, changed = self._newest(encoded)
            parts.append(part)
        else:
            ready, changed = self._open.push(encoded, seconds)
            if ready is not None:
                parts.append(self._closed(ready))
        self._renew(changed, pts_s)
        return parts

    @property
    def waiting(self) -> int:
        """Frames that wait for their segment."""
        return len(self._open)

    def tail(self) -> ReducedVideo | None:
        """What waits, reduced with what the bucket holds; None if nothing does."""
        waiting = self._open.waiting
        if waiting is None:
            return None
        memory = Memory(self._memory.seed, self._memory.tick)
        budget = Budget(self.bucket.offer(waiting.news, waiting.seconds))
        return reduce_video(waiting.video, self._reducer, budget, memory)

    def flush(self) -> list[Part]:
        """Close what waits; the next frame follows on nothing."""
        self._seen.reset()
        waiting = self._open.flush()
        return [] if waiting is None else [self._closed(waiting)]

    def note(self, kind: Kind, pts_s: float, **said: object) -> None:
        self.events.append(Event(self.name, kind, pts_s, said))

    def _closed(self, ready: Ready) -> Part:
        """What was earned while these frames lasted is theirs; that of the frames that still wait
        is not."""
        self._group += 1
        self.bucket.earn(ready.seconds)
        budget = Budget(self.bucket.offer(ready.news))
        video = reduce_video(ready.video, self._reducer, budget, self._memory)
        return self._spent(video, ready.news)

    def _newest(self, frame: EncodedVideo) -> tuple[Part, float]:
        most = round(self.config.anchor_share * self.bucket.capacity)
        news = self._seen.news(frame, max(1, min(most, self.bucket.tokens)), self.bucket.tokens)
        self._group += news.opens
        budget = Budget(news.plan.k)
        x = news.plan.apply(frame.x)
        video = ReducedVideo(x, news.plan, frame.grid, frame.pts_s, budget, (Segment(0, 1),))
        return self._spent(video, news.changed), news.changed

    def _spent(self, video: ReducedVideo, news: float) -> Part:
        self.bucket.spend(video.plan.k, news)
        counts = self.counts
        self.counts = replace(
            counts, parts=counts.parts + 1, tokens_out=counts.tokens_out + video.plan.k
        )
        self.note(
            "part",
            video.pts_s[-1],
            group=self._group,
            frames_s=list(video.pts_s),
            tokens=video.plan.k,
            budget=video.budget.tokens,
            segments=[[s.start, s.stop] for s in video.segments],
            grid=[video.grid.frames, video.grid.rows, video.grid.cols],
            plan=video.plan,
        )
        return Part(self._group, video)

    def _renew(self, changed: float, pts_s: float) -> None:
        """The first frame is new to the model, but says nothing about change."""
        before_s, self._offered_s = self._offered_s, pts_s
        if before_s is not None:
            weight = 1 - math.exp((before_s - pts_s) / _NOVELTY_S)
            self.novelty += (changed - self.novelty) * weight
