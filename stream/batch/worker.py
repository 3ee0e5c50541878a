"""One video at a time: hash, look up or encode, reduce, answer. Errors become outcomes."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from stream.data import Budget
from stream.errors import FoveateError, SourceError
from stream.memory import Memory
from stream.pipeline import (
    CHUNK_FRAMES,
    EncodedVideo,
    Encoder,
    Reasoner,
    ReducedVideo,
    Reply,
    Timings,
    chunked,
    reduce_video,
    timed,
)
from stream.reducers.base import Reducer
from stream.sources import Sampling, open_source
from stream.sources.base import Decoder

from .cache import TokenCache, content_hash
from .jobs import Cached, Outcome, VideoJob


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model and where it lives."""

    encoder: Encoder
    reasoner: Reasoner
    device: torch.device


@dataclass(frozen=True, slots=True)
class Recipe:
    """How every video of a run is treated.

    cache_config: hash of all that decides the reduced tokens beside the video.
    questions_at_once: how many go through the model as one batch.
    """

    sampling: Sampling
    reducer: Reducer
    retain: float
    cache_config: str
    decoder: Decoder = "pyav"
    seed: int = 0
    questions_at_once: int = 8


class VideoWorker:
    """Owns a model; does jobs."""

    def __init__(self, load: Callable[[], LoadedModel], recipe: Recipe, cache: TokenCache) -> None:
        self._model = load()
        self._recipe = recipe
        self._cache = cache

    def run(self, job: VideoJob) -> Outcome:
        """The outcome, also when the video or the model fails."""
        ms: Timings = {}
        try:
            video, extra, cached = self._tokens(job.path, ms)
            replies = self._answers(video, job.prompts)
        except FoveateError as error:
            return Outcome(job.key, error=str(error), fault="video", ms=ms)
        except Exception as error:
            return Outcome(job.key, error=_said(error), fault="video", ms=ms)
        for reply in replies:
            for stage, spent in reply.timings_ms.items():
                ms[stage] = ms.get(stage, 0.0) + spent
        layers = [n for reply in replies for n in reply.layer_tokens for _ in reply.answers]
        return Outcome(
            job.key,
            answers=tuple((a.text, round(a.confidence, 4)) for r in replies for a in r.answers),
            tokens_in=video.grid.size,
            tokens_out=video.plan.k,
            layer_tokens=sum(layers) / max(1, len(layers)),
            frames=extra["frames"],
            cached=cached,
            note=extra["note"],
            ms=ms,
        )

    def _answers(self, video: ReducedVideo, prompts: tuple[str, ...]) -> list[Reply]:
        size = self._recipe.questions_at_once
        return [
            self._model.reasoner.answer(video, prompts[first : first + size])
            for first in range(0, len(prompts), size)
        ]

    def _tokens(self, path: str, ms: Timings) -> tuple[ReducedVideo, dict[str, Any], Cached]:
        """(tokens, frames and note of the reading, where the tokens came from)."""
        device = self._model.device
        with open_source(path, self._recipe.decoder) as source:
            with timed(ms, "hash"):
                key = TokenCache.key(content_hash(path), self._recipe.cache_config, device.type)
                found = self._cache.get(key, device)
            if found is not None:
                return *found, "hit"
            parts: list[EncodedVideo] = []
            frames = 0
            chunks = chunked(source.read(self._recipe.sampling), CHUNK_FRAMES)
            while True:
                with timed(ms, "decode"):
                    chunk = next(chunks, None)
                if chunk is None:
                    break
                frames += len(chunk)
                with timed(ms, "encode"):
                    parts.append(self._model.encoder.encode(chunk))
            extra = {"frames": frames, "note": source.report.said}
        if not parts:
            raise SourceError(f"{path} gave no frame; it must hold at least one picture.")
        with timed(ms, "reduce"):
            encoded = EncodedVideo.joined(parts)
            parts.clear()
            budget = Budget.ratio(self._recipe.retain, of=encoded.grid.size)
            memory = Memory(seed=self._recipe.seed)
            video = reduce_video(encoded, self._recipe.reducer, budget, memory)
        stored = self._cache.put(key, video, extra)
        return video, extra, "new" if stored else "failed"


def _said(error: Exception) -> str:
    """An unforeseen error in one line, with the place where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} (at {where})"
