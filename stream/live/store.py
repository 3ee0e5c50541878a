"""Where a stream's reduced parts are: in the model's window, in the archive, or forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stream.data import Budget, PatchGrid
from stream.ops import similarity
from stream.pipeline import ReducedVideo
from stream.plan import Plan

from .values import Part, joined

_MIB = 1 << 20


def relevances(videos: Sequence[ReducedVideo], words: Tensor) -> list[float]:
    """How much each piece has to do with a question.

    Tokens and words live in the language model's input space: of each word, the cosine with its
    nearest token in a piece. Words count by how much that tells the pieces apart, so that the
    filler words of a question do not matter.

    words: [w, d], the embeddings of the question.
    """
    words = words.float()
    nearest = torch.stack(
        [
            similarity.cosine(words, v.x.float().to(words.device)).amax(1)
            if v.plan.k
            else words.new_full((words.shape[0],), -1.0)
            for v in videos
        ]
    )
    weight = nearest.std(0, correction=0) + 1e-6
    scores: list[float] = (nearest @ (weight / weight.sum())).tolist()
    return scores


class Window:
    """The parts that the model holds, in time order: at most `frames` frames, what waits included.

    The newest group always stays; a group leaves as a whole.
    """

    def __init__(self, frames: int, evict: str = "oldest") -> None:
        self._limit, self._evict = frames, evict
        self.parts: list[Part] = []
        self._words: Tensor | None = None

    def asked(self, words: Tensor) -> None:
        """What was last asked; it says which parts matter least."""
        self._words = words

    def admit(self, parts: Sequence[Part], waiting: int = 0) -> list[Part]:
        """Add parts; returns those that have to leave, in time order.

        waiting: frames that a question sees beside the window.
        """
        self.parts += parts
        left: list[Part] = []
        while sum(p.frames for p in self.parts) + waiting > self._limit:
            groups = list(dict.fromkeys(p.group for p in self.parts))
            if len(groups) < 2:
                break
            leaving = self._least(groups[:-1])
            left += [p for p in self.parts if p.group == leaving]
            self.parts = [p for p in self.parts if p.group != leaving]
        return left

    def _least(self, groups: Sequence[int]) -> int:
        """The group that leaves next; of equally relevant ones the oldest."""
        if self._evict == "oldest" or self._words is None:
            return min(groups)
        videos = [joined([p.video for p in self.parts if p.group == g]) for g in groups]
        worth = relevances(videos, self._words)
        return min(zip(worth, groups, strict=True))[1]


class Archive:
    """Reduced tokens of groups that left the window: in memory, or as safetensors in a folder.

    Of a merge only the result and its anchor are kept, which is all the model needs. The oldest are
    forgotten beyond `mib`.
    """

    def __init__(self, mib: float, folder: Path | None = None) -> None:
        self._limit, self._folder = mib * _MIB, folder
        self._held: dict[int, ReducedVideo | Path] = {}
        self._spans: dict[int, tuple[float, float]] = {}
        self._bytes: dict[int, int] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self._held)

    @property
    def mib(self) -> float:
        return sum(self._bytes.values()) / _MIB

    def put(self, group: int, video: ReducedVideo) -> list[int]:
        """Keep a group; returns the groups forgotten for it."""
        plan = Plan.keep(video.plan.anchor.cpu(), video.plan.n)
        small = replace(video, x=video.x.cpu(), plan=plan)
        self._spans[group] = (video.pts_s[0], video.pts_s[-1])
        self._bytes[group] = small.x.nbytes + small.plan.anchor.nbytes
        self._held[group] = small if self._folder is None else self._write(group, small)
        forgotten = []
        while sum(self._bytes.values()) > self._limit:
            oldest = min(self._held)
            gone = self._held.pop(oldest)
            if isinstance(gone, Path):
                gone.unlink(missing_ok=True)
            del self._spans[oldest], self._bytes[oldest]
            forgotten.append(oldest)
        return forgotten

    def get(self, group: int, device: torch.device | str = "cpu") -> ReducedVideo:
        """What `put` was given, with a plan that keeps anchors only."""
        held = self._held[group]
        video = _read(held) if isinstance(held, Path) else held
        return replace(video, x=video.x.to(device), plan=video.plan.to(device))

    def groups(self) -> list[int]:
        """All that is held, ascending."""
        return sorted(self._held)

    def spans(self) -> list[tuple[float, float]]:
        """Presentation times of the first and last frame of each group."""
        return list(self._spans.values())

    def between(self, first_s: float, last_s: float) -> list[int]:
        """Groups with a frame in the span, ascending."""
        return sorted(g for g, (a, b) in self._spans.items() if a <= last_s and b >= first_s)

    def _write(self, group: int, video: ReducedVideo) -> Path:
        assert self._folder is not None
        path = self._folder / f"{group:08d}.safetensors"
        grid = video.grid
        tensors = {
            "x": video.x,
            "anchor": video.plan.anchor,
            "pts_s": torch.tensor(video.pts_s, dtype=torch.float64),
            "shape": torch.tensor([grid.frames, grid.rows, grid.cols, video.budget.tokens]),
        }
        save_file({k: t.contiguous() for k, t in tensors.items()}, path)
        return path


def _read(path: Path) -> ReducedVideo:
    held = load_file(path)
    frames, rows, cols, tokens = held["shape"].tolist()
    grid = PatchGrid(frames, rows, cols)
    plan = Plan.keep(held["anchor"], grid.size)
    return ReducedVideo(held["x"], plan, grid, tuple(held["pts_s"].tolist()), Budget(tokens))


def most_relevant(videos: Sequence[ReducedVideo], words: Tensor, frames: int) -> list[int]:
    """Which of the pieces, ascending, fit in `frames` frames when the most relevant go first."""
    ranked = sorted(enumerate(relevances(videos, words)), key=lambda r: (-r[1], r[0]))
    chosen = []
    for index, _ in ranked:
        if videos[index].grid.frames <= frames:
            frames -= videos[index].grid.frames
            chosen.append(index)
    return sorted(chosen)
