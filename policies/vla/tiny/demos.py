"""Demonstrations held on the device, and training batches of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from stream.errors import SourceError

from .modeling import CHUNK

COPIED_AT_ONCE = 4096
SHIFT_PX = 4
BRIGHTNESS = 0.2


@dataclass(frozen=True, slots=True)
class Batch:
    """b moments of demonstrations; states and actions are normalised.

    images: float [b, cameras, height, width, 3] in 0..255, shifted, and darker or lighter.
    text_ids: long [b, t], BOS first, padded on the right; text_length: long [b], without BOS.
    state: [b, s]. actions: [b, chunk, a]; valid: bool [b, chunk], false behind an episode's end.
    pixels: [b, cameras, things, 2], row and column in `images`; NaN where unknown or outside.
    """

    images: Tensor
    text_ids: Tensor
    text_length: Tensor
    state: Tensor
    actions: Tensor
    valid: Tensor
    pixels: Tensor


@dataclass(frozen=True, slots=True)
class Recording:
    """One folder of `sims.collect`, with its pictures still on disk.

    images: uint8 [n, cameras, height, width, 3]; rows: the other arrays by name; about: tasks,
    instructions, cameras, dt_s.
    """

    images: NDArray[Any]
    rows: Mapping[str, NDArray[Any]]
    about: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Recording:
        try:
            images = np.load(folder / "images.npy", mmap_mode="r")
            with np.load(folder / "rows.npz") as rows:
                return cls(images, dict(rows), json.loads((folder / "about.json").read_text()))
        except (OSError, ValueError) as error:
            raise SourceError(
                f"{folder} holds no demonstrations ({error}); write them with sims.collect."
            ) from error

    def by_frame(self, name: str) -> NDArray[Any]:
        """A value of each episode, for each of its frames."""
        return np.repeat(self.rows[name], np.diff(self.rows["starts"]))


@dataclass(frozen=True, slots=True)
class Demonstrations:
    """n frames on one device, episode after episode.

    images: uint8 [n, cameras, height, width, 3]. state: float32 [n, s] and actions [n, a],
    normalised. pixels: float32 [n, cameras, things, 2]. last: long [n], the last frame of each
    frame's episode. instruction: long [n], row of text_ids [instructions, t] and text_length.
    share: float64 [n], running sum of the probability that a frame is drawn.
    """

    images: Tensor
    state: Tensor
    actions: Tensor
    pixels: Tensor
    last: Tensor
    instruction: Tensor
    text_ids: Tensor
    text_length: Tensor
    share: Tensor

    @classmethod
    def of(
        cls,
        recordings: Sequence[Recording],
        tokenizer: PreTrainedTokenizerFast,
        state_mean: Sequence[float],
        state_std: Sequence[float],
        weight: Mapping[str, float],
        device: torch.device,
    ) -> Demonstrations:
        """weight: how often a task's frames are drawn, against 1 for a task that is not named."""
        starts = [torch.from_numpy(r.rows["starts"]) for r in recordings]
        first = np.cumsum([0, *(len(r.images) for r in recordings)])
        last = [
            s[1:].repeat_interleave(s.diff()) - 1 + f
            for s, f in zip(starts, first[:-1], strict=True)
        ]
        texts = sorted({text for r in recordings for text in r.about["instructions"]})
        said = [np.array([texts.index(t) for t in r.about["instructions"]]) for r in recordings]
        encoded = tokenizer(texts, padding=True, return_tensors="pt")
        state = torch.from_numpy(np.concatenate([r.rows["state"] for r in recordings]))
        actions = torch.from_numpy(np.concatenate([r.rows["action"] for r in recordings]))
        tasks = np.concatenate([np.array(r.about["tasks"])[r.by_frame("task")] for r in recordings])
        instruction = [s[r.by_frame("instruction")] for s, r in zip(said, recordings, strict=True)]
        pixels = np.concatenate([r.rows["pixels"] for r in recordings])
        return cls(
            images=_copied([r.images for r in recordings], device),
            state=((state - torch.tensor(state_mean)) / torch.tensor(state_std)).to(device),
            actions=actions.to(device),
            pixels=torch.from_numpy(pixels).to(device),
            last=torch.cat(last).to(device),
            instruction=torch.from_numpy(np.concatenate(instruction)).to(device),
            text_ids=encoded.input_ids.to(device),
            text_length=(encoded.attention_mask.sum(-1) - 1).to(device),
            share=running_share(tasks, weight).to(device),
        )

    def draw(self, size: int, generator: torch.Generator) -> Batch:
        """Random moments, each camera shifted by up to SHIFT_PX and lit by up to BRIGHTNESS."""
        device = self.images.device

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=device)

        index = torch.searchsorted(self.share, uniform(size)).clamp(max=len(self.share) - 1)
        _, cameras, height, width, _ = self.images.shape
        shift = ((uniform(size, cameras, 2) * 2 - 1) * (SHIFT_PX + 0.5)).round().long()
        row = torch.arange(height, device=device) + shift[..., :1]
        col = torch.arange(width, device=device) + shift[..., 1:]
        images = self.images[
            index[:, None, None, None],
            torch.arange(cameras, device=device)[:, None, None],
            row.clamp(0, height - 1)[..., None],
            col.clamp(0, width - 1)[..., None, :],
        ]
        light = 1 + BRIGHTNESS * (uniform(size, 1, 1, 1, 1) * 2 - 1)
        pixels = self.pixels[index] - shift[:, :, None]
        inside = (pixels >= 0) & (pixels < pixels.new_tensor([height, width]))
        ahead = index[:, None] + torch.arange(CHUNK, device=device)
        last = self.last[index][:, None]
        said = self.instruction[index]
        return Batch(
            images=(images * light).clamp(0, 255),
            text_ids=self.text_ids[said],
            text_length=self.text_length[said],
            state=self.state[index],
            actions=self.actions[torch.minimum(ahead, last)],
            valid=ahead <= last,
            pixels=pixels.masked_fill(~inside.all(-1, keepdim=True), torch.nan),
        )


def running_share(tasks: NDArray[Any], weight: Mapping[str, float]) -> Tensor:
    """float64 [n]: each task is drawn by its weight, its frames alike. tasks: name by frame."""
    names, index, count = np.unique(tasks, return_inverse=True, return_counts=True)
    each = np.array([weight.get(str(name), 1.0) for name in names]) / count
    share = np.cumsum(each[index])
    return torch.from_numpy(share / share[-1])


def _copied(images: Sequence[NDArray[Any]], device: torch.device) -> Tensor:
    """All pictures in one tensor on the device, by pieces that fit anywhere."""
    total = sum(len(part) for part in images)
    out = torch.empty((total, *images[0].shape[1:]), dtype=torch.uint8, device=device)
    at = 0
    for part in images:
        for first in range(0, len(part), COPIED_AT_ONCE):
            piece = torch.from_numpy(np.array(part[first : first + COPIED_AT_ONCE]))
            out[at : at + len(piece)] = piece.to(device)
            at += len(piece)
    return out
