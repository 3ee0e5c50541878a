"""Endless training batches: scene scripts, sampling times, position scales and tokenised questions.

Every step draws its own frame count, tokens per frame and position scales, as real video models
meet them; the number of frames in a step is constant, so a step costs about the same.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .modeling import END, PAD, START, vocabulary
from .questions import TYPES, Question, draw_questions
from .render import SceneBatch, pack_scenes
from .world import Scene, Split, make_scene

QUESTION_TOKENS = 20
FRAME_COUNTS = {8: 0.28, 12: 0.07, 16: 0.27, 24: 0.10, 32: 0.28}
GRIDS = {14: 0.60, 13: 0.08, 12: 0.08, 11: 0.08, 10: 0.08, 9: 0.04, 7: 0.04}
# The first steps see fewer visual tokens: with them a question finds its thing sooner.
EARLY_STEPS = 1200
EARLY_FRAME_COUNTS = {4: 0.55, 8: 0.30, 16: 0.10, 32: 0.05}
EARLY_GRIDS = {14: 0.40, 10: 0.20, 7: 0.40}
_IDS = vocabulary()


@dataclass(frozen=True, slots=True)
class Batch:
    """B videos of T frames with Q questions each."""

    scenes: SceneBatch
    times_s: Tensor  # [B, T]
    frame_scale: Tensor  # [B, T] distance between the positions of neighbouring tokens
    grid: int
    question_ids: Tensor  # [B, Q, L] question, answer and end, padded on the right
    answer_at: Tensor  # [B, Q] index of the answer token in L
    type_ids: Tensor  # [B, Q] index into `questions.TYPES`


def question_ids(question: Question) -> list[int]:
    """The prompt's tail, from the question's first word to the generation prompt."""
    words = "".join(c if c.isalnum() else " " for c in question.text.lower()).split()
    return [_IDS[word] for word in words] + [_IDS[END], _IDS[START], _IDS["assistant"]]


def pack_questions(asked: Sequence[Sequence[Question]]) -> tuple[Tensor, Tensor, Tensor]:
    """B lists of Q questions -> ids [B, Q, QUESTION_TOKENS], answer_at [B, Q], type_ids [B, Q]."""
    rows, answer_at = [], []
    for question in (q for questions in asked for q in questions):
        prompt = question_ids(question)
        row = [*prompt, _IDS[question.answer], _IDS[END]]
        rows.append(row + [_IDS[PAD]] * (QUESTION_TOKENS - len(row)))
        answer_at.append(len(prompt))
    shape = (len(asked), len(asked[0]))
    types = torch.tensor([[TYPES.index(q.type) for q in questions] for questions in asked])
    return torch.tensor(rows).view(*shape, -1), torch.tensor(answer_at).view(shape), types


def sample_times(scenes: Sequence[Scene], n_frames: int, phase: float = 0.5) -> Tensor:
    """Uniform sampling: [B, T] seconds, each frame at `phase` of its share of the video."""
    duration_s = torch.tensor([scene.duration_s for scene in scenes])
    return (torch.arange(n_frames) + phase) / n_frames * duration_s[:, None]


def draw_scales(rng: random.Random, n_frames: int) -> list[float]:
    """Half the videos keep stock positions; the rest lie closer, some of them unevenly."""
    if rng.random() < 0.5:
        return [1.0] * n_frames
    scale = math.exp(rng.uniform(math.log(0.04), 0.0))
    spread = rng.choice((0.0, 0.0, 0.6))
    return [scale * math.exp(spread * rng.gauss(0, 1)) for _ in range(n_frames)]


def make_batch(
    split: Split,
    indices: Sequence[int],
    n_frames: int,
    grid: int,
    n_questions: int,
    rng: random.Random,
    *,
    augment: bool = True,
) -> Batch:
    """Scenes `indices` of a split; `augment` draws sampling phases and position scales."""
    scenes = [make_scene(split, index, n_frames) for index in indices]
    asked = [draw_questions(scene, n_questions, rng) for scene in scenes]
    ids, answer_at, types = pack_questions(asked)
    times_s = sample_times(scenes, n_frames)
    scale = torch.ones(len(scenes), n_frames)
    if augment:
        phases = torch.tensor([rng.choice((rng.random(), 0.5)) for _ in scenes])
        times_s += (phases[:, None] - 0.5) * times_s[:, :1] * 2
        scale = torch.tensor([draw_scales(rng, n_frames) for _ in scenes])
    return Batch(pack_scenes(scenes), times_s, scale, grid, ids, answer_at, types)


class TrainingBatches(Dataset[Batch]):
    """Batch number `step` of a training seed, made on demand by loader workers."""

    def __init__(self, seed: int, frames_per_step: int, n_questions: int) -> None:
        self.seed = seed
        self.frames_per_step = frames_per_step
        self.n_questions = n_questions

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, step: int) -> Batch:
        rng = random.Random(f"{self.seed}/{step}")
        early = step < EARLY_STEPS
        n_frames = _draw(rng, EARLY_FRAME_COUNTS if early else FRAME_COUNTS)
        grid = _draw(rng, EARLY_GRIDS if early else GRIDS)
        n_videos = max(1, self.frames_per_step // n_frames)
        indices = [rng.getrandbits(48) for _ in range(n_videos)]
        return make_batch("train", indices, n_frames, grid, self.n_questions, rng)


def _draw(rng: random.Random, weights: Mapping[int, float]) -> int:
    return rng.choices(list(weights), list(weights.values()))[0]
