"""What streaming costs in answers and saves in time: held-out clips as streams, beside offline runs
over the same frames.

Every clip is decoded and encoded once; each variant then takes the same features in, one frame
after another, and is asked when the last one has come.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from stream.data import Budget, Frame
from stream.live.session import Cache, Model, Session
from stream.live.values import Mode, StreamConfig
from stream.memory import Memory
from stream.pipeline import EncodedVideo, ReducedVideo, Reply, Timings, reduce_video, timed
from stream.reducers.base import Reducer
from stream.sources import Uniform, open_source
from stream.sources.live_values import LiveFrame

from .quality import Piece, append_pieces, paired_difference, read_pieces

Progress = Callable[[str, int], None]
RETAIN = 0.15
FRAMES = 32
BETWEEN_CLIPS_S = 1.0


@dataclass(frozen=True, slots=True)
class Clip:
    """frames: with ascending pts_s and an index of their own each, across all clips of a stream."""

    path: Path
    frames: tuple[Frame, ...]
    questions: tuple[Any, ...]

    @property
    def span_s(self) -> tuple[float, float]:
        return self.frames[0].pts_s, self.frames[-1].pts_s


class EncodedOnce:
    """A model whose encoder remembers the frames it has seen, by index; the rest is the model's."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._seen: dict[int, EncodedVideo] = {}

    def learn(self, frames: Sequence[Frame]) -> None:
        """Encode frames ahead of time; frames of one shape, with indices not seen before."""
        for start in range(0, len(frames), 8):
            chunk = frames[start : start + 8]
            for frame, encoded in zip(chunk, self._model.encode(chunk).by_frame(), strict=True):
                self._seen[frame.index] = encoded

    @property
    def patches(self) -> int:
        """Of one grid frame."""
        return next(iter(self._seen.values())).grid.per_frame

    def forget(self) -> None:
        self._seen.clear()

    def encode(self, frames: Sequence[Frame]) -> EncodedVideo:
        return EncodedVideo.joined([replace(self._seen[f.index], pts_s=(f.pts_s,)) for f in frames])

    def frames_per_token(self) -> int:
        return self._model.frames_per_token()

    def words(self, text: str) -> Tensor:
        return self._model.words(text)

    def live_cache(self, reanchor: str) -> Cache:
        return self._model.live_cache(reanchor)

    def answer(self, video: ReducedVideo, questions: Sequence[str]) -> Reply:
        return self._model.answer(video, questions)


Asked = tuple[Path, Sequence[Any]]
"""A video and the questions about it."""


def read_clip(asked: Asked, first_index: int = 0) -> Clip:
    """FRAMES frames of a video, numbered from `first_index` on."""
    path, questions = asked
    with open_source(path) as source:
        frames = list(source.read(Uniform(FRAMES)))
    numbered = tuple(replace(f, index=first_index + i) for i, f in enumerate(frames))
    return Clip(path, numbered, tuple(questions))


def later(clip: Clip, by_s: float) -> Clip:
    """The clip with all its times moved by `by_s` seconds."""
    return replace(clip, frames=tuple(replace(f, pts_s=f.pts_s + by_s) for f in clip.frames))


def in_a_row(clips: Sequence[Clip]) -> list[Clip]:
    """The same clips, each after the one before it, as one stream shows them."""
    placed, start_s = [], 0.0
    for clip in clips:
        placed.append(later(clip, start_s - clip.frames[0].pts_s))
        start_s = placed[-1].frames[-1].pts_s + BETWEEN_CLIPS_S
    return placed


def show(session: Session, name: str, clip: Clip) -> None:
    """Frame by frame, as if each had just come."""
    for frame in clip.frames:
        session.step({name: [LiveFrame(frame, time.monotonic(), time.time(), 0, None)]})


def rate_of(clip: Clip, patches: int) -> float:
    """Tokens a second that give a stream of the clip what RETAIN of its `patches` patches a frame
    give an offline run."""
    tokens = Budget.ratio(RETAIN, of=patches * len(clip.frames)).tokens
    return tokens / (clip.span_s[1] - clip.span_s[0])


def right(reply: Reply, questions: Sequence[Any]) -> list[bool]:
    """Whether each answer is the word that was asked for."""
    return [a.text == q.answer for a, q in zip(reply.answers, questions, strict=True)]


def texts(clip: Clip) -> list[str]:
    return [q.text for q in clip.questions]


VARIANTS: dict[str, dict[str, Any]] = {
    "closed, unlimited lag": {"lag_frames": None},
    "closed, lag 16": {"lag_frames": 16},
    "closed, lag 8": {"lag_frames": 8},
    "closed, lag 8, gate": {"lag_frames": 8, "gate_level": 6.0},
    "anchor": {"mode": "anchor"},
}


Measured = Callable[[EncodedOnce, Reducer, Sequence[Clip], int], list[Piece]]
"""(model, reducer, clips, seed) -> one piece a variant, about the first of the clips"""


def accuracy(once: EncodedOnce, reducer: Reducer, clips: Sequence[Clip], seed: int) -> list[Piece]:
    """Offline and every variant of a stream of the clip, over the same frames."""
    clip = clips[0]
    once.learn(clip.frames)
    encoded = once.encode(clip.frames)
    budget = Budget.ratio(RETAIN, of=encoded.grid.size)
    offline = reduce_video(encoded, reducer, budget, Memory(seed=seed))
    pieces = [_piece("offline", clip, once.answer(offline, texts(clip)), offline.plan.k)]
    for variant, settings in VARIANTS.items():
        session = Session(once, reducer)
        rate = rate_of(clip, once.patches)
        config = {"fps": None, "gate_level": 0.0, "tokens_per_s": rate, "seed": seed}
        session.attach("clip", StreamConfig.model_validate({**config, **settings}))
        show(session, "clip", clip)
        live = session.ask("clip", texts(clip))
        tail = session.tail("clip")
        alone = session.window("clip") == () and tail is not None
        same = alone and tail is not None and tail.plan.same_as(offline.plan)
        pieces.append(
            _piece(variant, clip, live.reply, spent(session, "clip"), same_plan=float(same))
        )
    return pieces


def past(once: EncodedOnce, reducer: Reducer, clips: Sequence[Clip], seed: int) -> list[Piece]:
    """Questions about a clip after the others have pushed it out of the live window.

    `just seen` asks before they come, `window only` after, without the archive.
    """
    asked, *others = in_a_row(clips)
    for clip in (asked, *others):
        once.learn(clip.frames)
    config = StreamConfig(
        fps=None, gate_level=0.0, tokens_per_s=rate_of(asked, once.patches), seed=seed
    )
    session = Session(once, reducer)
    session.attach("row", config)
    session.attach("refilled", config.model_copy(update={"reanchor": "refill"}))
    for name in session.names:
        show(session, name, asked)
    replies = {"just seen": session.ask("row", texts(asked))}
    for name in session.names:
        for clip in others:
            show(session, name, clip)
    replies["window only"] = session.ask("row", texts(asked))
    replies["window only, refilled"] = session.ask("refilled", texts(asked))
    replies["archive, by relevance"] = session.ask("row", texts(asked), recall=True)
    replies["archive, by time"] = session.ask("row", texts(asked), span_s=asked.span_s)
    return [_piece(name, asked, live.reply, 0) for name, live in replies.items()]


def sharing(once: EncodedOnce, reducer: Reducer, clips: Sequence[Clip], seed: int) -> list[Piece]:
    """One busy camera (the first clip) and three still ones (the others' first pictures): the same
    tokens a second in equal parts, or by novelty; questions about the busy one."""
    clip, *others = clips
    once.learn(clip.frames)
    stills = {f"still{k}": other.frames[0] for k, other in enumerate(others)}
    once.learn(list(stills.values()))
    pieces = []
    for variant, floor in (("equal split", 1.0), ("shared by novelty", 0.2)):
        total = rate_of(clip, once.patches)
        session = Session(once, reducer, shared_tokens_per_s=total, floor=floor)
        for name in ("busy", *stills):
            session.attach(
                name, StreamConfig(fps=None, tokens_per_s=total / (1 + len(stills)), seed=seed)
            )
        for frame in clip.frames:
            now = {n: [_arrived(replace(f, pts_s=frame.pts_s))] for n, f in stills.items()}
            session.step({"busy": [_arrived(frame)], **now})
        live = session.ask("busy", texts(clip))
        pieces.append(_piece(variant, clip, live.reply, spent(session, "busy")))
    return pieces


MEASURES: dict[str, tuple[Measured, int, int]] = {
    "accuracy": (accuracy, 1, 1),
    "past": (past, 3, 3),
    "sharing": (sharing, 4, 1),
}
"""Name -> (measure, clips it takes, how many clips on the next piece of work begins)"""


def measured(
    name: str,
    model: Model,
    reducer: Reducer,
    items: Sequence[Asked],
    seed: int,
    log: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Run what is not in `log` yet, then sum up; differences from the first variant are paired."""
    measure, taken, stride = MEASURES[name]
    done = {p.video for p in read_pieces(log)}
    once = EncodedOnce(model)
    begins = range(0, len(items) - (taken if stride > 1 else 1) + 1, stride)
    for number, begin in enumerate(begins, start=1):
        if items[begin][0].name not in done:
            chosen = [items[(begin + k) % len(items)] for k in range(taken)]
            once.forget()
            clips = [read_clip(item, k * FRAMES) for k, item in enumerate(chosen)]
            append_pieces(log, measure(once, reducer, clips, seed))
        progress("clips", number)
    asked = {items[begin][0].name for begin in begins}
    pieces = [p for p in read_pieces(log) if p.video in asked]
    variants = list(dict.fromkeys(p.method for p in pieces))
    rows = [_row(pieces, variant, variants[0], seed) for variant in variants]
    return {"videos": len(asked), "rows": rows}


def spent(session: Session, name: str) -> int:
    """Tokens a stream has given to the model, those of what waits included."""
    tail = session.tail(name)
    return session.counts(name).tokens_out + (tail.plan.k if tail else 0)


def first_token(
    model: Model, reducer: Reducer, items: Sequence[Asked], repeats: int, progress: Progress
) -> dict[str, Any]:
    """A question's time to its first token: offline over a clip's frames, and on an attached stream
    that has just seen them. Medians over clips and repeats, milliseconds, split by stage."""
    offline: list[Timings] = []
    attached: dict[Mode, list[Timings]] = {"closed": [], "anchor": []}
    session = Session(model, reducer)
    for number, item in enumerate(items):
        clip = read_clip(item)
        question = texts(clip)[:1]
        for repeat in range(repeats + 1):
            spent: Timings = {}
            with timed(spent, "decode"), open_source(clip.path) as source:
                frames = list(source.read(Uniform(len(clip.frames))))
            with timed(spent, "encode"):
                chunks = [model.encode(frames[i : i + 8]) for i in range(0, len(frames), 8)]
                encoded = EncodedVideo.joined(chunks)
            with timed(spent, "reduce"):
                budget = Budget.ratio(RETAIN, of=encoded.grid.size)
                video = reduce_video(encoded, reducer, budget, Memory())
            spent["prefill"] = model.answer(video, question).timings_ms["prefill"]
            if repeat:
                offline.append(spent)
        for mode, rows in attached.items():
            name = f"{mode} {number}"
            rate = rate_of(clip, encoded.grid.per_frame)
            session.attach(
                name, StreamConfig(mode=mode, fps=None, gate_level=0.0, tokens_per_s=rate)
            )
            before = dict(session.timings_ms)
            show(session, name, clip)
            arrival = {
                f"{stage} on arrival": ms - before.get(stage, 0.0)
                for stage, ms in session.timings_ms.items()
            }
            for repeat in range(repeats + 1):
                began_s = time.perf_counter()
                live = session.ask(name, question)
                whole_ms = (time.perf_counter() - began_s) * 1e3
                decode_ms = live.reply.timings_ms["decode_tokens"]
                if repeat:
                    rows.append({**arrival, "question": whole_ms - decode_ms})
            session.detach(name)
        progress("clips", number + 1)
    table: dict[str, Timings] = {"offline": _medians(offline)}
    for mode, rows in attached.items():
        table[mode] = _medians(rows)
    whole_ms = statistics.median(sum(row.values()) for row in offline)
    prefill_ms = table["offline"]["prefill"]
    return {
        "ms": table,
        "offline_first_token_ms": whole_ms,
        "times_faster": {m: whole_ms / table[m]["question"] for m in attached},
        "times_faster_than_its_prefill": {m: prefill_ms / table[m]["question"] for m in attached},
        "n": len(offline),
    }


def _arrived(frame: Frame) -> LiveFrame:
    return LiveFrame(frame, time.monotonic(), time.time(), 0, None)


def _medians(rows: Sequence[Timings]) -> Timings:
    return {stage: statistics.median(r[stage] for r in rows) for stage in rows[0]}


def _piece(variant: str, clip: Clip, reply: Reply, tokens: int, **said: float) -> Piece:
    kinds = [q.type for q in clip.questions]
    return Piece(
        clip.path.name, variant, RETAIN, right(reply, clip.questions), kinds, tokens, 0.0, said
    )


def _row(pieces: Sequence[Piece], name: str, base: str, seed: int) -> dict[str, Any]:
    mine = [p for p in pieces if p.method == name]
    answers = [good for p in mine for good in p.right]
    gap, low, high = paired_difference(pieces, (name, RETAIN), (base, RETAIN), seed)
    return {
        "variant": name,
        "n": len(answers),
        "accuracy": 100 * sum(answers) / len(answers),
        "minus": gap,
        "low": low,
        "high": high,
        "tokens": sum(p.tokens for p in mine) / len(mine),
        "same_plans": int(sum(p.ms.get("same_plan", 0.0) for p in mine)),
    }
