"""The one place that knows the order of the stages: decode, encode, reduce, answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from .data import Answer, Budget, Frame, PatchGrid, Segment, Step, VisualTokens
from .errors import SourceError, ValueShapeError
from .memory import Memory
from .plan import Plan
from .reducers.base import Reducer, reduce_stage
from .signals import Signal, Signals
from .sources import DecodeReport, Sampling, Source

Timings = dict[str, float]
Progress = Callable[[str, int], None]
"""(stage, frames or questions done so far) -> None"""

CHUNK_FRAMES = 8


@dataclass(frozen=True, slots=True)
class EncodedVideo:
    """Features and signals of consecutive frames, before any reduction.

    x: [n, d] in (t, y, x) order; signals: float32 [n] each; pts_s: one for each grid frame.
    """

    x: Tensor
    signals: dict[Signal, Tensor]
    grid: PatchGrid
    pts_s: tuple[float, ...]

    @classmethod
    def joined(cls, parts: Sequence[EncodedVideo]) -> EncodedVideo:
        """Consecutive parts of one video as one."""
        first = parts[0].grid
        if any((p.grid.rows, p.grid.cols) != (first.rows, first.cols) for p in parts):
            raise ValueShapeError("The parts of a video have different patch grids.")
        return cls(
            torch.cat([p.x for p in parts]),
            {s: torch.cat([p.signals[s] for p in parts]) for s in parts[0].signals},
            PatchGrid(sum(p.grid.frames for p in parts), first.rows, first.cols),
            tuple(t for p in parts for t in p.pts_s),
        )

    def by_frame(self) -> list[EncodedVideo]:
        """Each grid frame as a video of its own."""
        size, one = self.grid.per_frame, PatchGrid(1, self.grid.rows, self.grid.cols)
        rows = [slice(t * size, (t + 1) * size) for t in range(self.grid.frames)]
        return [
            EncodedVideo(
                self.x[at].clone(), {s: v[at].clone() for s, v in self.signals.items()}, one, (t,)
            )
            for at, t in zip(rows, self.pts_s, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class ReducedVideo:
    """What reaches the language model: x [k, d] and the plan that made it."""

    x: Tensor
    plan: Plan
    grid: PatchGrid
    pts_s: tuple[float, ...]
    budget: Budget
    segments: tuple[Segment, ...] = ()


class Encoder(Protocol):
    """Frames -> features of their patches."""

    def encode(self, frames: Sequence[Frame]) -> EncodedVideo: ...


@dataclass(frozen=True, slots=True)
class Reply:
    """Answers to questions about one video.

    plans: for each question, what became of the tokens in the whole model, inside included.
    layer_tokens: visual tokens that entered each decoder layer, mean over questions.
    """

    answers: tuple[Answer, ...]
    plans: tuple[Plan, ...]
    layer_tokens: tuple[float, ...]
    timings_ms: Timings = field(default_factory=dict)


class Reasoner(Protocol):
    """Reduced tokens and questions -> answers."""

    def answer(self, video: ReducedVideo, questions: Sequence[str]) -> Reply: ...


@dataclass(frozen=True, slots=True)
class RunResult:
    """One video, its questions, and everything a person or a record wants to know of the run."""

    step: Step
    reply: Reply
    video: ReducedVideo
    frames: tuple[Frame, ...]
    report: DecodeReport
    restarts: tuple[str, ...] = ()


@contextmanager
def timed(timings: Timings, stage: str) -> Iterator[None]:
    """Add the block's wall time to timings[stage], milliseconds."""
    start = time.perf_counter()
    try:
        yield
    finally:
        timings[stage] = timings.get(stage, 0.0) + (time.perf_counter() - start) * 1e3


def reduce_video(
    video: EncodedVideo, reducer: Reducer, budget: Budget, memory: Memory
) -> ReducedVideo:
    """Run the stages of `reducer` that act before the language model."""
    tokens = VisualTokens.full(video.x, video.grid, video.pts_s)
    plan = None
    memory.state.pop("segments", None)
    for stage in reducer.stages:
        if stage.site.in_llm:
            continue
        signals = Signals({s: v[tokens.index] for s, v in video.signals.items()})
        step = reduce_stage(stage, tokens, signals, budget, memory)
        plan = step if plan is None else step @ plan
        tokens = VisualTokens(step.apply(tokens.x), plan.anchor, video.grid, video.pts_s)
    plan = plan or Plan.identity(tokens.n, tokens.x.device)
    memory.tick += 1
    starts = memory.state.get("segments", [0])
    stops = [*starts[1:], video.grid.frames]
    segments = tuple(Segment(a, b) for a, b in zip(starts, stops, strict=True))
    return ReducedVideo(tokens.x, plan, video.grid, video.pts_s, budget, segments)


def chunked(frames: Iterator[Frame], size: int) -> Iterator[list[Frame]]:
    while chunk := list(islice(frames, size)):
        yield chunk


def result_of(
    video: ReducedVideo,
    reply: Reply,
    frames: Sequence[Frame],
    report: DecodeReport,
    timings: Timings,
    restarts: tuple[str, ...] = (),
) -> RunResult:
    """Put the pieces of a run together; shared by all runners."""
    step = Step(
        tick=0,
        first_pts_s=video.pts_s[0],
        last_pts_s=video.pts_s[-1],
        tokens_in=video.grid.size,
        tokens_out=video.plan.k,
        budget_tokens=video.budget.tokens,
        timings_ms=timings | reply.timings_ms,
        output={"answers": [a.text for a in reply.answers]},
    )
    return RunResult(step, reply, video, tuple(frames), report, restarts)


def run_inline(
    source: Source,
    sampling: Sampling,
    encoder: Encoder,
    reducer: Reducer,
    reasoner: Reasoner,
    questions: Sequence[str],
    *,
    retain: float,
    seed: int = 0,
    progress: Progress = lambda stage, done: None,
) -> RunResult:
    """The whole pipeline in this process.

    retain: share of the visual tokens that the reducer's budget allows, in (0, 1].
    """
    timings: Timings = {}
    frames: list[Frame] = []
    parts: list[EncodedVideo] = []
    chunks = chunked(source.read(sampling), CHUNK_FRAMES)
    while True:
        with timed(timings, "decode"):
            chunk = next(chunks, None)
        if chunk is None:
            break
        frames += chunk
        progress("decode", len(frames))
        with timed(timings, "encode"):
            parts.append(encoder.encode(chunk))
        progress("encode", len(frames))
    if not parts:
        raise SourceError("The source gave no frame; give one that holds at least one picture.")
    with timed(timings, "reduce"):
        encoded = EncodedVideo.joined(parts)
        parts.clear()
        budget = Budget.ratio(retain, of=encoded.grid.size)
        video = reduce_video(encoded, reducer, budget, Memory(seed=seed))
    progress("reduce", len(frames))
    reply = reasoner.answer(video, questions)
    progress("answer", len(questions))
    return result_of(video, reply, frames, source.report, timings)
