"""What streaming costs in answers and saves in time: held-out clips as streams, beside offline runs
over the same frames.

Every clip is decoded and encoded once; each variant then takes the same features in, one frame
after another, and is asked when the last one has come.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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

from .quality import Piece, paired_difference

Progress = Callable[[str, int], None]
RETAIN = 0.15
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


def clips_of(items: Mapping[Path, Sequence[Any]], frames: int) -> list[Clip]:
    """The videos of a manifest with their questions, `frames` frames of each."""
    clips, first = [], 0
    for path, asked in items.items():
        with open_source(path) as source:
            read = list(source.read(Uniform(frames)))
        numbered = tuple(replace(f, index=first + i) for i, f in enumerate(read))
        first += len(read)
        clips.append(Clip(path, numbered, tuple(i.question for i in asked)))
    return clips


def later(clip: Clip, by_s: float) -> Clip:
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


def accuracy(
    model: Model, reducer: Reducer, clips: Sequence[Clip], seed: int, progress: Progress
) -> dict[str, Any]:
    """Offline and every variant of the stream over the same frames; differences paired by clip."""
    once = EncodedOnce(model)
    pieces: list[Piece] = []
    same_plans = 0
    for done, clip in enumerate(clips, start=1):
        once.forget()
        once.learn(clip.frames)
        encoded = once.encode(clip.frames)
        budget = Budget.ratio(RETAIN, of=encoded.grid.size)
        offline = reduce_video(encoded, reducer, budget, Memory(seed=seed))
        pieces.append(_piece("offline", clip, model.answer(offline, texts(clip)), offline.plan.k))
        for variant, settings in VARIANTS.items():
            session = Session(once, reducer)
            rate = rate_of(clip, once.patches)
            config = {"fps": None, "gate_level": 0.0, "tokens_per_s": rate, "seed": seed}
            session.attach("clip", StreamConfig.model_validate({**config, **settings}))
            show(session, "clip", clip)
            live = session.ask("clip", texts(clip))
            tail = session.tail("clip")
            tokens = session.counts("clip").tokens_out + (tail.plan.k if tail else 0)
            pieces.append(_piece(variant, clip, live.reply, tokens))
            if settings.get("lag_frames", 0) is None and tail is not None:
                same_plans += tail.plan.same_as(offline.plan)
        progress("clips", done)
    return {
        "rows": [_row(pieces, name, "offline", seed) for name in ("offline", *VARIANTS)],
        "same_plans": same_plans,
        "clips": len(clips),
    }


PAST = (
    "just seen",
    "window only",
    "window only, refilled",
    "archive, by relevance",
    "archive, by time",
)


def past(
    model: Model,
    reducer: Reducer,
    clips: Sequence[Clip],
    seed: int,
    progress: Progress,
    between: int = 2,
) -> dict[str, Any]:
    """Questions about a clip after `between` others have pushed it out of the live window.

    `just seen` asks before they come, `window only` after, without the archive.
    """
    once = EncodedOnce(model)
    pieces: list[Piece] = []
    for number in range(0, len(clips) - between, between + 1):
        asked, *others = in_a_row(clips[number : number + between + 1])
        once.forget()
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
        pieces += [_piece(name, asked, live.reply, 0) for name, live in replies.items()]
        progress("streams", number // (between + 1) + 1)
    return {"rows": [_row(pieces, name, "just seen", seed) for name in PAST], "between": between}


def sharing(
    model: Model, reducer: Reducer, clips: Sequence[Clip], seed: int, progress: Progress
) -> dict[str, Any]:
    """One busy camera (a clip) and three still ones (the first picture of three others): the same
    tokens a second in equal parts, or by novelty; questions about the busy one."""
    once = EncodedOnce(model)
    pieces: list[Piece] = []
    spent: dict[str, list[int]] = {"equal split": [], "shared by novelty": []}
    for number, clip in enumerate(clips):
        once.forget()
        once.learn(clip.frames)
        others = [clips[(number + k) % len(clips)].frames[0] for k in (1, 2, 3)]
        once.learn(others)
        for variant in spent:
            total = rate_of(clip, once.patches)
            floor = 1.0 if variant == "equal split" else 0.2
            session = Session(once, reducer, shared_tokens_per_s=total, floor=floor)
            for name in ("busy", "still0", "still1", "still2"):
                session.attach(name, StreamConfig(fps=None, tokens_per_s=total / 4, seed=seed))
            for frame in clip.frames:
                now = [replace(o, pts_s=frame.pts_s) for o in others]
                arrived = {f"still{k}": [_arrived(o)] for k, o in enumerate(now)}
                session.step({"busy": [_arrived(frame)], **arrived})
            live = session.ask("busy", texts(clip))
            tail = session.tail("busy")
            tokens = session.counts("busy").tokens_out + (tail.plan.k if tail else 0)
            spent[variant].append(tokens)
            pieces.append(_piece(variant, clip, live.reply, tokens))
        progress("clips", number + 1)
    return {"rows": [_row(pieces, name, "equal split", seed) for name in spent]}


def first_token(
    model: Model, reducer: Reducer, clips: Sequence[Clip], repeats: int, progress: Progress
) -> dict[str, Any]:
    """A question's time to its first token: offline over a clip's frames, and on an attached stream
    that has just seen them. Medians over clips and repeats, milliseconds, split by stage."""
    offline: list[Timings] = []
    attached: dict[Mode, list[Timings]] = {"closed": [], "anchor": []}
    session = Session(model, reducer)
    for number, clip in enumerate(clips):
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


def _piece(variant: str, clip: Clip, reply: Reply, tokens: int) -> Piece:
    kinds = [q.type for q in clip.questions]
    return Piece(
        clip.path.name, variant, RETAIN, right(reply, clip.questions), kinds, tokens, 0.0, {}
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
    }
