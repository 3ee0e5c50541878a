"""A model of arithmetic: patches are 4 x 4 block means of the picture, and it remembers what it was
told to hold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from stream.data import Answer, Frame, PatchGrid
from stream.live.gate import block_means
from stream.pipeline import EncodedVideo, ReducedVideo, Reply
from stream.signals import Signal
from stream.sources.live_values import Gap, LiveFrame

SIDE = 4


def picture(level: int, patch: int = 0, shade: int = 0) -> NDArray[np.uint8]:
    """32 x 32 of one grey; one of the 16 patches may have another."""
    image = np.full((32, 32, 3), level, np.uint8)
    y, x = divmod(patch, SIDE)
    image[y * 8 : y * 8 + 8, x * 8 : x * 8 + 8] += np.uint8(shade)
    return image


def arrived(image: NDArray[np.uint8], pts_s: float, gap: Gap | None = None) -> LiveFrame:
    return LiveFrame(Frame(image, pts_s, round(pts_s * 10)), pts_s + 0.1, 1e9 + pts_s, 0, gap)


class FakeCache:
    def __init__(self) -> None:
        self.held: list[ReducedVideo] = []
        self.steps: list[int] = []

    def hold(self, videos: Sequence[ReducedVideo]) -> None:
        self.held = list(videos)
        self.steps.append(len(videos))

    def answer(self, questions: Sequence[str], tail: ReducedVideo | None) -> Reply:
        return say([*self.held, *([tail] if tail else [])], questions)


class FakeModel:
    """Features: 3 colors, a constant, and the block's place, so that patches differ."""

    def __init__(self, frames_per_token: int = 1) -> None:
        self._frames_per_token = frames_per_token
        self.batches: list[int] = []

    def encode(self, frames: Sequence[Frame]) -> EncodedVideo:
        self.batches.append(len(frames))
        taken = frames[:: self._frames_per_token]
        return encoded([f.image for f in taken], [f.pts_s for f in taken])

    def frames_per_token(self) -> int:
        return self._frames_per_token

    def words(self, text: str) -> Tensor:
        """One word, `#LEVEL`: the feature of a patch of that grey; 128 for any other text."""
        level = int(text[1:]) if text[1:].isdigit() else 128
        return encoded([picture(level)], [0.0]).x[:1]

    def live_cache(self, reanchor: str) -> FakeCache:
        return FakeCache()

    def answer(self, video: ReducedVideo, questions: Sequence[str]) -> Reply:
        return say([video], questions)


class PooledModel(FakeModel):
    """Takes pictures of any size."""

    def encode(self, frames: Sequence[Frame]) -> EncodedVideo:
        small = [
            np.asarray(Image.fromarray(f.image).resize((32, 32), Image.Resampling.BOX))
            for f in frames
        ]
        return encoded(small, [f.pts_s for f in frames])


def encoded(images: Sequence[NDArray[np.uint8]], times: Sequence[float]) -> EncodedVideo:
    blocks = []
    for image in images:
        means = torch.from_numpy(block_means(image)).view(SIDE, 8, SIDE, 8, 3).mean((1, 3))
        color = means.view(-1, 3) / 255 - 0.5
        blocks.append(torch.cat([color, 0.1 * torch.ones(SIDE * SIDE, 1)], 1))
    x = torch.cat(blocks)
    return EncodedVideo(
        x,
        {Signal.SALIENCY: x.abs().sum(1)},
        PatchGrid(len(images), SIDE, SIDE),
        tuple(times),
    )


def say(videos: Sequence[ReducedVideo], questions: Sequence[str]) -> Reply:
    times = [t for v in videos for t in v.pts_s]
    text = f"{len(times)} frames from {times[0]:g} to {times[-1]:g}"
    timings_ms = {"prefill": 1.0, "decode_tokens": 0.0}
    return Reply(tuple(Answer(text, (), 1.0) for _ in questions), (), (), timings_ms)
