"""Attached streams behind one model: everything `watch` and `serve` do, without their edges.

    session = Session(model, reducer)
    session.attach("door", StreamConfig(tokens_per_s=60))
    session.step({"door": live_frames})            # as they arrive; several streams in one call
    reply = session.ask("door", ["what moves?"])   # about now: the prefill of the question alone
    reply = session.ask("door", ["..."], span_s=(60, 90))   # about the past, from the archive
    reply = session.ask("door", ["..."], recall=True)       # the most relevant of all that is held

`step` returns what happened, as plain events for a record. Calls may come from several threads;
they take turns.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Protocol

from torch import Tensor

from stream.data import Frame
from stream.errors import ConfigError, SourceError
from stream.pipeline import EncodedVideo, ReducedVideo, Reply, Timings, timed
from stream.reducers.base import Reducer
from stream.registry import suggest
from stream.sources.live_values import LiveFrame

from .budget_bucket import shares
from .engine import Counts, StreamEngine, Wanted
from .spans import span_in
from .store import Archive, Window, most_relevant
from .values import Event, LiveReply, Part, StreamConfig, joined


class Cache(Protocol):
    """What the model remembers of one stream."""

    def hold(self, videos: Sequence[ReducedVideo]) -> None:
        """Remember exactly these: the ones held already that are not among them leave, those that
        follow are prefilled."""

    def answer(self, questions: Sequence[str], tail: ReducedVideo | None) -> Reply:
        """About what is held, and then `tail`, which is not remembered."""


class Model(Protocol):
    """A video LLM."""

    def encode(self, frames: Sequence[Frame]) -> EncodedVideo: ...

    def frames_per_token(self) -> int:
        """Consecutive frames that one grid frame covers."""

    def words(self, text: str) -> Tensor:
        """[w, d]: a text in the language model's input space."""

    def live_cache(self, reanchor: str) -> Cache: ...

    def answer(self, video: ReducedVideo, questions: Sequence[str]) -> Reply: ...


@dataclass(slots=True)
class _Attached:
    engine: StreamEngine
    cache: Cache
    window: Window
    archive: Archive
    pending: list[Wanted] = field(default_factory=list)


class Session:
    """See the module's text.

    shared_tokens_per_s: one budget for all streams, shared by novelty with `floor` of it in equal
    parts; None lets each have its own `tokens_per_s`.
    """

    def __init__(
        self,
        model: Model,
        reducer: Reducer,
        *,
        shared_tokens_per_s: float | None = None,
        floor: float = 0.5,
    ) -> None:
        self._model, self._reducer = model, reducer
        self._shared, self._floor = shared_tokens_per_s, floor
        self._streams: dict[str, _Attached] = {}
        self._lock = threading.RLock()
        self.timings_ms: Timings = {}
        """Wall time of each stage so far, summed: gate, encode, reduce, prefill."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._streams)

    def attach(
        self, name: str, config: StreamConfig | None = None, archive: Path | None = None
    ) -> None:
        """archive: folder of what leaves the window; in memory without one."""
        config = config or StreamConfig()
        with self._lock:
            if name in self._streams:
                raise ConfigError(f"A stream named '{name}' is attached already; detach it first.")
            self._streams[name] = _Attached(
                StreamEngine(name, config, self._reducer),
                self._model.live_cache(config.reanchor),
                Window(config.window_frames, config.evict),
                Archive(config.archive_mib, archive),
            )

    def detach(self, name: str) -> None:
        with self._lock:
            self._of(name)
            del self._streams[name]

    def counts(self, name: str) -> Counts:
        return self._of(name).engine.counts

    def newest_s(self, name: str) -> tuple[float, float] | None:
        """(presentation, arrival) time of the newest frame that was encoded, or gated because it
        looked the same; None before the first."""
        return self._of(name).engine.newest_s

    def tokens_per_s(self) -> dict[str, float]:
        """What each stream earns now."""
        return {n: s.engine.bucket.rate_per_s for n, s in self._streams.items()}

    def window(self, name: str) -> tuple[Part, ...]:
        return tuple(self._of(name).window.parts)

    def tail(self, name: str) -> ReducedVideo | None:
        """What waits for its segment, as a question would see it now."""
        with self._lock:
            return self._of(name).engine.tail()

    def step(self, arrived: Mapping[str, Sequence[LiveFrame]]) -> list[Event]:
        """Take in frames, of each stream in order; encodes those of all streams together."""
        with self._lock:
            ready: list[tuple[_Attached, list[Wanted]]] = []
            with timed(self.timings_ms, "gate"):
                for name, frames in arrived.items():
                    stream = self._of(name)
                    for got in frames:
                        wanted = stream.engine.offer(got)
                        if wanted is not None:
                            ready += [(stream, group) for group in self._grouped(stream, wanted)]
            with timed(self.timings_ms, "encode"):
                encoded = self._encode([group for _, group in ready])
            self._share()
            for (stream, group), video in zip(ready, encoded, strict=True):
                self._accept(stream, group, video)
            return self._events(arrived)

    def flush(self, name: str) -> list[Event]:
        """The stream ended: what waits reaches the model now."""
        with self._lock:
            stream = self._of(name)
            if stream.pending:
                group, stream.pending = self._filled(stream.pending), []
                self._accept(stream, group, self._encode([group])[0])
            self._admit(stream, stream.engine.flush())
            return self._events([name])

    def ask(
        self,
        name: str,
        questions: Sequence[str],
        *,
        span_s: tuple[float, float] | None = None,
        recall: bool = False,
    ) -> LiveReply:
        """Answer about the live window; or about a span of media time, which the first question
        may name itself (`between 60 and 90 s`); or (`recall`) about the parts, archived ones
        included, that have most to do with the first question.

        The past is prefilled from stored tokens, as many frames as the window has.
        Raises SourceError where nothing was seen yet, or nothing of the span is held.
        """
        with self._lock:
            stream = self._of(name)
            newest_s = stream.engine.newest_s
            if newest_s is None:
                raise SourceError(f"The stream '{name}' has given no frame yet; ask again later.")
            words = self._model.words(questions[0])
            span_s = span_s or span_in(questions[0])
            stream.window.asked(words)
            tail = stream.engine.tail()
            seen = [p.video for p in stream.window.parts] + ([tail] if tail else [])
            recalled = 0
            if span_s is None and not recall:
                reply = stream.cache.answer(questions, tail)
                seen_s = newest_s[0]
            else:
                seen, recalled = self._past(stream, words, span_s, seen)
                reply = self._model.answer(joined(seen), questions)
                seen_s = seen[-1].pts_s[-1]
            spans_s = tuple((v.pts_s[0], v.pts_s[-1]) for v in seen)
            arrival_s = newest_s[1] - (newest_s[0] - seen_s)
            return LiveReply(reply, spans_s, seen_s, arrival_s, recalled)

    def _past(
        self,
        stream: _Attached,
        words: Tensor,
        span_s: tuple[float, float] | None,
        live: list[ReducedVideo],
    ) -> tuple[list[ReducedVideo], int]:
        """(held pieces in time order, how many of them from the archive)."""
        archive = stream.archive
        groups = archive.groups() if span_s is None else archive.between(*span_s)
        held = [(archive.get(g, words.device), 1) for g in groups]
        if span_s is not None:
            first_s, last_s = span_s
            live = [v for v in live if v.pts_s[0] <= last_s and v.pts_s[-1] >= first_s]
        held = sorted([*held, *((v, 0) for v in live)], key=lambda h: h[0].pts_s[0])
        if not held:
            raise SourceError(
                f"Nothing of {span_s} s is held of the stream '{stream.engine.name}'; "
                f"it holds {self._held_span(stream)}."
            )
        limit = stream.engine.config.window_frames
        chosen = [held[i] for i in most_relevant([v for v, _ in held], words, limit)]
        return [v for v, _ in chosen], sum(archived for _, archived in chosen)

    def _held_span(self, stream: _Attached) -> str:
        spans = [p.span_s for p in stream.window.parts] + stream.archive.spans()
        return f"{min(spans)[0]:.1f} to {max(spans)[1]:.1f} s" if spans else "nothing"

    def _of(self, name: str) -> _Attached:
        if name not in self._streams:
            raise suggest("stream", name, self._streams)
        return self._streams[name]

    def _grouped(self, stream: _Attached, wanted: Wanted) -> list[list[Wanted]]:
        """The groups of frames, one grid frame each, that `wanted` completes."""
        size = self._model.frames_per_token()
        groups = []
        if wanted.gap is not None and stream.pending:
            groups.append(self._filled(stream.pending))
            stream.pending = []
        stream.pending.append(wanted)
        if len(stream.pending) == size:
            groups.append(stream.pending)
            stream.pending = []
        return groups

    def _filled(self, group: list[Wanted]) -> list[Wanted]:
        """A group cut short, filled up with its last frame."""
        return group + [group[-1]] * (self._model.frames_per_token() - len(group))

    def _encode(self, groups: Sequence[list[Wanted]]) -> list[EncodedVideo]:
        """One grid frame for each group; pictures of one size go through the encoder together."""
        encoded: list[EncodedVideo] = []
        for _, same in groupby(groups, key=lambda g: g[0].frame.image.shape):
            batch = list(same)
            whole = self._model.encode([w.frame for group in batch for w in group])
            encoded += whole.by_frame()
        return encoded

    def _share(self) -> None:
        if self._shared is None:
            return
        novelty = {n: s.engine.novelty for n, s in self._streams.items()}
        for name, rate in shares(self._shared, novelty, self._floor).items():
            self._streams[name].engine.bucket.rate_per_s = rate

    def _accept(self, stream: _Attached, group: list[Wanted], video: EncodedVideo) -> None:
        with timed(self.timings_ms, "reduce"):
            parts = stream.engine.accept(video, group[0].gap)
        stream.engine.newest_s = group[-1].frame.pts_s, group[-1].arrival_s
        self._admit(stream, parts)

    def _admit(self, stream: _Attached, parts: Sequence[Part]) -> None:
        """Let parts into the window and others out of it, and let the cache follow."""
        engine = stream.engine
        left = stream.window.admit(parts, engine.waiting)
        now_s = parts[-1].video.pts_s[-1] if parts else (engine.newest_s or (0.0,))[0]
        for group, pieces in groupby(left, key=lambda p: p.group):
            video = joined([p.video for p in pieces])
            span_s = [video.pts_s[0], video.pts_s[-1]]
            engine.note("evicted", now_s, group=group, span_s=span_s)
            for gone in stream.archive.put(group, video):
                engine.note("forgotten", now_s, group=gone)
        if parts or left:
            with timed(self.timings_ms, "prefill"):
                stream.cache.hold([p.video for p in stream.window.parts])

    def _events(self, names: Sequence[str] | Mapping[str, object]) -> list[Event]:
        events: list[Event] = []
        for name in names:
            engine = self._streams[name].engine
            events += engine.events
            engine.events.clear()
        return events
