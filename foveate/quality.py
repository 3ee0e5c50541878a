"""How much accuracy each method keeps: held-out videos, all methods behind the same features.

Every video is decoded and encoded once; each (method, retain ratio) then reduces the same tokens
and answers the same questions. Each finished piece is one JSON line, so a stopped run goes on
where it was.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stream.config import Config

from .settings import reducer_of

BOOTSTRAPS = 2000


class QualityConfig(Config):
    """What decides the result of a run; its hash names the run folder."""

    model: str
    videos: int
    frames: int
    split: str
    positions: str
    seed: int
    dtype: Literal["float32", "bfloat16"] = "float32"
    settings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """One method at one ratio on one video."""

    video: str
    method: str
    retain: float
    right: list[bool]
    types: list[str]
    tokens: int
    layer_tokens: float
    ms: dict[str, float]

    @property
    def key(self) -> tuple[str, str, float]:
        return (self.video, self.method, self.retain)


@dataclass(frozen=True, slots=True)
class Row:
    """One method at one ratio over all videos.

    minus_full, low, high: accuracy minus that of all tokens, with a 95 % interval from paired
    resampling of videos, in points.
    """

    method: str
    retain: float
    n: int
    accuracy: float
    relative: float
    minus_full: float
    low: float
    high: float
    tokens: float
    layer_tokens: float
    ms: dict[str, float]
    by_type: dict[str, float]


Job = tuple[str, list[tuple[str, str, str]], list[tuple[str, float]]]
"""(video, its (question, answer, type), the (method, retain) still to do)"""


def jobs_of(
    items: Iterable[Any], methods: Sequence[str], ratios: Sequence[float], done: set[Any]
) -> list[Job]:
    """Group questions by video and leave out what is done."""
    asked: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for item in items:
        question = item.question
        asked[str(item.video)].append((question.text, question.answer, question.type))
    wanted = [("identity", 1.0), ("blank", 1.0)]
    wanted += [(m, r) for m in methods if m != "identity" for r in ratios if r < 1]
    jobs = []
    for video, questions in asked.items():
        todo = [(m, r) for m, r in wanted if (video, m, r) not in done]
        if todo:
            jobs.append((video, questions, todo))
    return jobs


_rank = 0
"""Number of this process among the workers of a run."""


def _claim_rank(taken: Any) -> None:
    global _rank
    with taken.get_lock():
        _rank = taken.value
        taken.value += 1


@lru_cache(maxsize=1)
def _model(name: str, device: str | None, dtype: str) -> tuple[Any, Any]:
    """The model of this process; workers take the GPUs in turn."""
    import torch

    from policies.models import load, quiet

    quiet()
    if device == "cuda":
        torch.set_num_threads(1)
        device = f"cuda:{_rank % torch.cuda.device_count()}"
    return load(name, device, getattr(torch, dtype))


def run_job(job: Job, config: QualityConfig, device: str | None) -> list[Piece]:
    """All pending methods on one video."""
    from policies.reasoner import VideoReasoner
    from stream.data import Budget, Frame
    from stream.memory import Memory
    from stream.pipeline import CHUNK_FRAMES, EncodedVideo, chunked, reduce_video, timed
    from stream.reducers.saliency import Saliency
    from stream.sources import Uniform, open_source

    path, questions, todo = job
    model, processor = _model(config.model, device, config.dtype)
    ms: dict[str, float] = {}
    with open_source(path) as source, timed(ms, "decode"):
        frames = list(source.read(Uniform(config.frames)))
    encoder = VideoReasoner(model, processor, Saliency())

    def encode(pictures: list[Frame]) -> EncodedVideo:
        return EncodedVideo.joined(
            [encoder.encode(part) for part in chunked(iter(pictures), CHUNK_FRAMES)]
        )

    with timed(ms, "encode"):
        encoded = encode(frames)
    black = [Frame(np.zeros_like(f.image), f.pts_s, f.index) for f in frames]
    pieces = []
    for method, retain in todo:
        reducer = reducer_of("identity" if method == "blank" else method, config.settings)
        seen = encode(black) if method == "blank" else encoded
        reasoner = VideoReasoner(
            model,
            processor,
            reducer,
            positions=config.positions,  # type: ignore[arg-type]
            max_new_tokens=4,
        )
        spent = dict(ms)
        budget = Budget.ratio(retain, of=seen.grid.size)
        with timed(spent, "reduce"):
            video = reduce_video(seen, reducer, budget, Memory(seed=config.seed))
        reply = reasoner.answer(video, [q for q, _, _ in questions])
        pieces.append(
            Piece(
                video=path,
                method=method,
                retain=retain,
                right=[
                    a.text.strip(" .").lower() == answer.lower()
                    for a, (_, answer, _) in zip(reply.answers, questions, strict=True)
                ],
                types=[kind for _, _, kind in questions],
                tokens=video.plan.k,
                layer_tokens=sum(reply.layer_tokens) / len(reply.layer_tokens),
                ms=spent | reply.timings_ms,
            )
        )
    return pieces


def run_jobs(
    jobs: Sequence[Job], config: QualityConfig, device: str | None, workers: int
) -> Iterator[list[Piece]]:
    """Pieces of each video as it is done; several processes share the devices in turn."""
    if workers == 1:
        for job in jobs:
            yield run_job(job, config, device)
        return
    spawn = get_context("spawn")
    taken = spawn.Value("i", 0)
    with ProcessPoolExecutor(
        workers, mp_context=spawn, initializer=_claim_rank, initargs=(taken,)
    ) as pool:
        pending = [pool.submit(run_job, job, config, device) for job in jobs]
        try:
            for future in as_completed(pending):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def read_pieces(path: Path) -> list[Piece]:
    """What an earlier run finished; a line cut off by a kill is left out."""
    pieces = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                pieces.append(Piece(**json.loads(line)))
            except (json.JSONDecodeError, TypeError):
                continue
    return pieces


def append_pieces(path: Path, pieces: Sequence[Piece]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(asdict(p)) + "\n" for p in pieces)


def rows_of(pieces: Sequence[Piece], seed: int) -> list[Row]:
    """The table: full tokens first, then methods by falling ratio.

    Intervals resample videos, the same resample for both sides of a difference.
    """
    by_method: dict[tuple[str, float], dict[str, Piece]] = defaultdict(dict)
    for piece in pieces:
        by_method[(piece.method, piece.retain)][piece.video] = piece
    full = by_method[("identity", 1.0)]
    videos = sorted(full)
    size = np.array([len(full[v].right) for v in videos])
    base = np.array([sum(full[v].right) for v in videos])
    rows = []
    order = sorted(by_method, key=lambda k: (-k[1], k[0] != "identity", k[0]))
    for method, retain in order:
        mine = by_method[(method, retain)]
        if set(mine) != set(full):
            continue
        right = np.array([sum(mine[v].right) for v in videos])
        minus_full, low, high = points_between(right - base, size, seed)
        rows.append(
            Row(
                method=method,
                retain=retain,
                n=int(size.sum()),
                accuracy=100 * right.sum() / size.sum(),
                relative=100 * right.sum() / max(1, base.sum()),
                minus_full=minus_full,
                low=low,
                high=high,
                tokens=_mean(p.tokens for p in mine.values()),
                layer_tokens=_mean(p.layer_tokens for p in mine.values()),
                ms={k: _mean(p.ms[k] for p in mine.values()) for k in mine[videos[0]].ms},
                by_type=_by_type(mine.values()),
            )
        )
    return rows


def paired_difference(
    pieces: Sequence[Piece], one: tuple[str, float], other: tuple[str, float], seed: int
) -> tuple[float, float, float]:
    """(accuracy of `one` minus `other`, low, high) in points, paired by video."""
    sides: list[dict[str, Piece]] = [
        {p.video: p for p in pieces if (p.method, p.retain) == side} for side in (one, other)
    ]
    videos = sorted(set(sides[0]) & set(sides[1]))
    size = np.array([len(sides[0][v].right) for v in videos])
    gap = np.array([sum(sides[0][v].right) - sum(sides[1][v].right) for v in videos])
    return points_between(gap, size, seed)


def points_between(gap: NDArray[Any], size: NDArray[Any], seed: int) -> tuple[float, float, float]:
    """(points, low, high at 95 %) by which one side answers more, resampling videos in pairs.

    gap: right answers of one side less the other's, by video; size: questions, by video.
    """
    draws = np.random.default_rng(seed).integers(0, len(size), (BOOTSTRAPS, len(size)))
    means = 100 * gap[draws].sum(1) / size[draws].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(100 * gap.sum() / size.sum()), float(low), float(high)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _by_type(pieces: Iterable[Piece]) -> dict[str, float]:
    right: dict[str, list[bool]] = defaultdict(list)
    for piece in pieces:
        for kind, good in zip(piece.types, piece.right, strict=True):
            right[kind].append(good)
    return {kind: 100 * sum(r) / len(r) for kind, r in sorted(right.items())}
