"""Watch attached streams: take frames in, ask when it is time, tell what happened."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from stream.errors import SourceError
from stream.sources.live_values import End, LiveFrame, Silence

from .feeds import Feed
from .session import Session
from .values import Event, LiveReply

_PATIENCE_S = 0.02
_LAGS_KEPT = 2048


@dataclass(frozen=True, slots=True)
class Questions:
    """asked: every `every_s` seconds, each time. standing: as often, told when the answer changes.

    status_s: how often each stream says how it fares.
    """

    asked: tuple[str, ...] = ()
    standing: tuple[str, ...] = ()
    every_s: float = 5.0
    status_s: float = 10.0


class Listener(Protocol):
    """Told of everything, for a record or a view."""

    def saw(self, stream: str, got: LiveFrame) -> None: ...

    def told(self, row: Mapping[str, Any]) -> None: ...


class Watcher:
    """One turn after another: what came, what is due.

    Rows are plain data with `kind`, `stream` and `at_unix_s`; answers tell how old the newest frame
    behind them was, `lag` is from a frame's arrival until the model's window has it or it waits
    for its segment.
    """

    def __init__(
        self,
        session: Session,
        feeds: Mapping[str, Feed],
        questions: Questions,
        listeners: Sequence[Listener] = (),
    ) -> None:
        self._session, self._questions, self._listeners = session, questions, listeners
        self._feeds = dict(feeds)
        self._lags: dict[str, deque[float]] = {n: deque(maxlen=_LAGS_KEPT) for n in feeds}
        self._phase: dict[str, str] = {}
        self._last_answer: dict[tuple[str, str], str] = {}
        self._began_s = time.monotonic()
        self._asked_s = dict.fromkeys(feeds, self._began_s)
        self._status_s = dict.fromkeys(feeds, self._began_s)

    @property
    def watching(self) -> bool:
        return bool(self._feeds)

    def turn(self) -> Iterator[dict[str, Any]]:
        """Take in what has come and yield the rows a person wants to see."""
        arrived: dict[str, list[LiveFrame]] = {}
        ended: dict[str, End] = {}
        for name, feed in self._feeds.items():
            got = feed.take(0.0 if arrived else _PATIENCE_S / len(self._feeds))
            if isinstance(got, End):
                ended[name] = got
            elif isinstance(got, Silence):
                yield from self._silent(name, got)
            else:
                arrived[name] = got
                yield from self._again(name)
        for name, frames in arrived.items():
            for frame in frames:
                for listener in self._listeners:
                    listener.saw(name, frame)
        self._tell(self._session.step(arrived))
        now_s = time.monotonic()
        for name, frames in arrived.items():
            self._lags[name] += [f.age_s(now_s) for f in frames]
        for name in self._feeds:
            if name in ended:
                self._tell(self._session.flush(name))
            if name in ended or self._due(self._asked_s, name, self._questions.every_s):
                yield from self._answers(name)
            if name in ended or self._due(self._status_s, name, self._questions.status_s):
                yield self._row("status", name, **self.status(name))
        for name, end in ended.items():
            self._feeds.pop(name).close()
            yield self._row("end", name, said=end.said, failed=end.failed)

    def status(self, name: str) -> dict[str, Any]:
        """Counts, rates and lags of one stream so far."""
        counts = self._session.counts(name)
        lasted_s = max(1e-9, time.monotonic() - self._began_s)
        lags = np.array(self._lags[name] or [0.0])
        p50, p95, p99 = (float(q) for q in np.quantile(lags, [0.5, 0.95, 0.99]))
        return {
            **asdict(counts),
            "fps": counts.frames / lasted_s,
            "encoded_fps": counts.encoded / lasted_s,
            "tokens_per_s": counts.tokens_out / lasted_s,
            "lag_p50_s": p50,
            "lag_p95_s": p95,
            "lag_p99_s": p99,
            "source": self._feeds[name].said() if name in self._feeds else {},
        }

    def close(self) -> None:
        for feed in self._feeds.values():
            feed.close()
        self._feeds.clear()

    def _due(self, last_s: dict[str, float], name: str, every_s: float) -> bool:
        now_s = time.monotonic()
        if now_s - last_s[name] < every_s:
            return False
        last_s[name] = now_s
        return True

    def _answers(self, name: str) -> Iterator[dict[str, Any]]:
        questions = (*self._questions.asked, *self._questions.standing)
        if not questions:
            return
        try:
            live = self._session.ask(name, questions)
        except SourceError as error:
            yield self._row("waiting", name, said=str(error))
            return
        for i, (question, answer) in enumerate(zip(questions, live.reply.answers, strict=True)):
            standing = i >= len(self._questions.asked)
            before = self._last_answer.get((name, question))
            self._last_answer[name, question] = answer.text
            if standing and answer.text == before:
                continue
            said = answer_row(question, live, i)
            if standing:
                said["was"] = before
            yield self._row("answer", name, **said)

    def _silent(self, name: str, got: Silence) -> Iterator[dict[str, Any]]:
        if got.said and self._phase.get(name) != got.phase:
            self._phase[name] = got.phase
            yield self._row(
                "phase", name, phase=got.phase, said=got.said, frame_age_s=got.frame_age_s
            )

    def _again(self, name: str) -> Iterator[dict[str, Any]]:
        if self._phase.pop(name, None) is not None:
            yield self._row("phase", name, phase="live", said="frames come again", frame_age_s=0.0)

    def _row(self, kind: str, name: str, **said: Any) -> dict[str, Any]:
        row = {"kind": kind, "stream": name, "at_unix_s": time.time(), **said}
        for listener in self._listeners:
            listener.told(row)
        return row

    def _tell(self, events: Sequence[Event]) -> None:
        for event in events:
            row = {"kind": event.kind, "stream": event.stream, "pts_s": event.pts_s}
            for listener in self._listeners:
                listener.told({**row, "at_unix_s": time.time(), **event.said})


def answer_row(question: str, live: LiveReply, index: int) -> dict[str, Any]:
    """One answer with what it rests on, as plain data."""
    answer = live.reply.answers[index]
    return {
        "question": question,
        "answer": answer.text,
        "confidence": answer.confidence,
        "pts_s": live.newest_pts_s,
        "frame_age_s": live.age_s(time.monotonic()),
        "seen_s": [list(span) for span in live.spans_s],
        "recalled": live.recalled,
        "first_token_ms": live.reply.timings_ms.get("prefill"),
    }
