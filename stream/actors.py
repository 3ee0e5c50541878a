"""Ray actors: thin shells around the pure parts of the pipeline.

A source actor decodes, an encoder actor encodes and reduces, a reasoner actor answers. Calls are
idempotent (a chunk of frames is named by its first frame), so Ray may repeat them: a killed actor
is restarted and the run completes. Frames cross as object references; only reduced tokens reach
the reasoner.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from typing import Any

os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves workers beside other work

import ray
import torch

from .data import Budget, Frame
from .errors import FoveateError, SourceError
from .memory import Memory
from .pipeline import (
    CHUNK_FRAMES,
    EncodedVideo,
    Encoder,
    Progress,
    Reasoner,
    ReducedVideo,
    Reply,
    RunResult,
    Timings,
    reduce_video,
    result_of,
    timed,
)
from .reducers.base import Reducer
from .sources import DecodeReport, Sampling, Source, open_source
from .sources.base import Decoder

MAX_CHUNKS_IN_FLIGHT = 3
RESTARTS = 3


class _Actor:
    def _use_all_cores(self) -> None:
        """Ray gives an actor without reserved CPUs one thread; stages take turns, so all may use
        every core."""
        torch.set_num_threads(len(os.sched_getaffinity(0)))

    def was_restarted(self) -> bool:
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)

    def pid(self) -> int:
        return os.getpid()


class SourceActor(_Actor):
    """Owns a demuxer and a decoder; `read` may be asked for any chunk again."""

    def __init__(self, path: str, decoder: Decoder, sampling: Sampling) -> None:
        self._path, self._decoder, self._sampling = path, decoder, sampling
        self._next = -1
        self._frames: Iterator[Frame] = iter(())

    @cached_property
    def _source(self) -> Source:
        return open_source(self._path, self._decoder)

    def read(self, first: int, count: int) -> tuple[list[Frame], int, float]:
        """(frames first..first+count-1, how many there were, milliseconds)."""
        timings: Timings = {}
        with timed(timings, "decode"):
            if first != self._next:
                self._frames = self._source.read(self._sampling, first)
            frames = list(islice(self._frames, count))
        self._next = first + len(frames)
        return frames, len(frames), timings["decode"]

    def report(self) -> DecodeReport:
        return self._source.report


class EncoderActor(_Actor):
    """Owns the vision encoder."""

    def __init__(self, factory: Callable[[], Encoder]) -> None:
        self._use_all_cores()
        self._encoder = factory()

    def encode(self, frames: list[Frame]) -> tuple[EncodedVideo, float]:
        timings: Timings = {}
        with timed(timings, "encode"):
            part = self._encoder.encode(frames)
        return part, timings["encode"]

    def reduce(
        self, reducer: Reducer, retain: float, seed: int, *parts: EncodedVideo
    ) -> tuple[ReducedVideo, float]:
        timings: Timings = {}
        with timed(timings, "reduce"):
            encoded = EncodedVideo.joined(parts)
            budget = Budget.ratio(retain, of=encoded.grid.size)
            video = reduce_video(encoded, reducer, budget, Memory(seed=seed))
        return video, timings["reduce"]


class ReasonerActor(_Actor):
    """Owns the language model."""

    def __init__(self, factory: Callable[[], Reasoner]) -> None:
        self._use_all_cores()
        self._reasoner = factory()

    def answer(self, video: ReducedVideo, questions: Sequence[str]) -> Reply:
        return self._reasoner.answer(video, questions)


@contextmanager
def local_ray(address: str | None = None) -> Iterator[None]:
    """Ray for the block: this process's own, the cluster at `address`, or a new local one."""
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"address": address or "local"}
    if address is None:
        options["include_dashboard"] = False
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    try:
        yield
    finally:
        ray.shutdown()


def _start(cls: type[Any], *args: Any) -> Any:
    remote = ray.remote(num_cpus=0, max_restarts=RESTARTS, max_task_retries=RESTARTS)(cls)
    return remote.remote(*args)


def run_ray(
    path: str,
    decoder: Decoder,
    sampling: Sampling,
    encoder: Callable[[], Encoder],
    reducer: Reducer,
    reasoner: Callable[[], Reasoner],
    questions: Sequence[str],
    *,
    retain: float,
    seed: int = 0,
    address: str | None = None,
    progress: Progress = lambda stage, done: None,
    on_start: Callable[[dict[str, Any]], None] = lambda actors: None,
) -> RunResult:
    """The whole pipeline over Ray actors.

    encoder, reasoner: factories that run inside their actor. At most MAX_CHUNKS_IN_FLIGHT chunks
    of CHUNK_FRAMES frames are decoded but not yet encoded. on_start receives the actors by name.
    """
    with local_ray(address):
        actors = {
            "source": _start(SourceActor, path, decoder, sampling),
            "encoder": _start(EncoderActor, encoder),
            "reasoner": _start(ReasonerActor, reasoner),
        }
        try:
            on_start(actors)
            return _run(actors, reducer, questions, retain, seed, progress)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, FoveateError):
                raise cause from None
            raise
        finally:
            for actor in actors.values():
                ray.kill(actor)


def _run(
    actors: dict[str, Any],
    reducer: Reducer,
    questions: Sequence[str],
    retain: float,
    seed: int,
    progress: Progress,
) -> RunResult:
    timings: Timings = {"decode": 0.0, "encode": 0.0}
    frame_refs: list[Any] = []
    part_refs: list[Any] = []
    waiting: dict[Any, int] = {}
    decoded = encoded = 0

    def collect(limit: int) -> None:
        nonlocal encoded
        while len(waiting) > limit:
            done, _ = ray.wait(list(waiting), num_returns=1)
            encoded += waiting.pop(done[0])
            timings["encode"] += ray.get(done[0])
            progress("encode", encoded)

    while True:
        frames, count_ref, ms_ref = (
            actors["source"].read.options(num_returns=3).remote(decoded, CHUNK_FRAMES)
        )
        count, ms = ray.get([count_ref, ms_ref])
        timings["decode"] += ms
        if count == 0:
            break
        decoded += count
        progress("decode", decoded)
        frame_refs.append(frames)
        part, ms_ref = actors["encoder"].encode.options(num_returns=2).remote(frames)
        part_refs.append(part)
        waiting[ms_ref] = count
        collect(MAX_CHUNKS_IN_FLIGHT)
        if count < CHUNK_FRAMES:
            break
    collect(0)
    if not part_refs:
        raise SourceError("The source gave no frame; give one that holds at least one picture.")
    video_ref, ms_ref = (
        actors["encoder"].reduce.options(num_returns=2).remote(reducer, retain, seed, *part_refs)
    )
    timings["reduce"] = ray.get(ms_ref)
    progress("reduce", decoded)
    reply_ref = actors["reasoner"].answer.remote(video_ref, list(questions))
    reply, video, report = ray.get([reply_ref, video_ref, actors["source"].report.remote()])
    progress("answer", len(questions))
    frames_of_chunks = ray.get(frame_refs)
    flags = ray.get([a.was_restarted.remote() for a in actors.values()])
    restarts = tuple(name for name, again in zip(actors, flags, strict=True) if again)
    all_frames = [f for chunk in frames_of_chunks for f in chunk]
    return result_of(video, reply, all_frames, report, timings, restarts)
