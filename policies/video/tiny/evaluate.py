"""Accuracy by question type: whole, blank, and with simple choices of 10 % of the tokens.

    python -m policies.video.tiny.evaluate --manifest DIR/manifest.jsonl --out report.json

These reducers are deliberately plain and live here only to judge the questions and the model.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .batches import Batch, make_batch, pack_questions
from .codec import degrade
from .modeling import DEFAULT_CHECKPOINT, Model, load_checkpoint
from .packed import HEAD_TOKENS, frame_tokens, question_states, received_attention, visual_positions
from .questions import CHANCE, TYPES
from .render import render, token_labels

TOKENS_PER_FRAME = 196
Counts = dict[str, dict[str, list[int]]]  # condition -> type -> [right, asked]


@dataclass(frozen=True, slots=True)
class Clips:
    """B clips of T frames with Q questions each; `thing_tokens` only of rendered clips."""

    frames: Tensor  # [B, T, 3, 224, 224] in [0, 1]
    question_ids: Tensor  # [B, Q, L]
    answer_at: Tensor  # [B, Q]
    type_ids: Tensor  # [B, Q], -1 where padded
    thing_tokens: Tensor | None = None  # [B, T * 196] bool


def keep_choices(clips: Clips, saliency: Tensor, share: float) -> Iterator[tuple[str, Tensor]]:
    """Named index sets [B, k], ascending, of about `share` of the T * 196 tokens."""
    b, n_frames = clips.frames.shape[:2]
    n = n_frames * TOKENS_PER_FRAME
    k = round(share * n)
    device = clips.frames.device
    noise = torch.rand(b, n, generator=torch.Generator().manual_seed(0)).to(device)
    per_frame = round(share * TOKENS_PER_FRAME)
    n_kept_frames = max(1, round(share * n_frames))
    every = ((torch.arange(k, device=device) + 0.5) * n / k).long()
    frames = ((torch.arange(n_kept_frames, device=device) + 0.5) * n_frames / n_kept_frames).long()
    inside = torch.arange(TOKENS_PER_FRAME, device=device)
    yield "random", noise.topk(k).indices.sort().values
    yield "uniform", every.expand(b, -1)
    yield "fewer frames", (frames[:, None] * TOKENS_PER_FRAME + inside).flatten().expand(b, -1)
    ranked = saliency.unflatten(1, (n_frames, -1)).topk(per_frame).indices
    first = torch.arange(n_frames, device=device)[:, None] * TOKENS_PER_FRAME
    yield "saliency", (ranked + first).flatten(1).sort().values
    if clips.thing_tokens is not None:
        yield "things only", (clips.thing_tokens + 0.5 * noise).topk(k).indices.sort().values


@torch.inference_mode()
def answers_right(
    model: Model, clips: Clips, visual: Tensor, positions: Tensor, start: Tensor
) -> Tensor:
    """Whether the greedy first word is the answer: [B, Q] bool."""
    states = question_states(model, visual, positions, start, clips.question_ids)
    at = clips.answer_at[..., None]
    asking = states.gather(2, (at - 1)[..., None].expand(-1, -1, -1, states.shape[-1]))[:, :, 0]
    said: Tensor = model.lm_head(asking).argmax(-1)
    return said == clips.question_ids.gather(2, at)[..., 0]


@torch.inference_mode()
def judge(model: Model, clips: Clips, share: float | None) -> dict[str, Tensor]:
    """Right or wrong by condition, each [B, Q]; without a share only whole and blank."""
    frames = clips.frames
    b, n_frames = frames.shape[:2]
    scale = torch.ones(b, n_frames, device=frames.device)
    positions, start = visual_positions(scale, 14)
    visual = _in_chunks(lambda x: frame_tokens(model, x[None]).read[0], frames)
    blank = frame_tokens(model, torch.full_like(frames[:1], 0.5)).read.expand(b, -1, -1)
    right = {
        "full": answers_right(model, clips, visual, positions, start),
        "blank": answers_right(model, clips, blank, positions, start),
    }
    if share is None:
        return right
    saliency = _in_chunks(lambda x: received_attention(model, (x - 0.5) / 0.5).flatten(), frames)
    for name, kept in keep_choices(clips, saliency, share):
        some = visual.gather(1, kept[..., None].expand(-1, -1, visual.shape[-1]))
        at = torch.cat((positions.gather(1, kept), positions[:, -1:]), dim=1)
        dense = torch.arange(kept.shape[1] + 1, device=at.device).float().expand(b, -1)
        dense = dense + len(HEAD_TOKENS)
        right[f"{name}, keep"] = answers_right(model, clips, some, at, start)
        right[f"{name}, renumber"] = answers_right(model, clips, some, dense, dense[:, -1] + 1)
    return right


def _in_chunks(function: Callable[[Tensor], Tensor], frames: Tensor) -> Tensor:
    """Apply to one video at a time, so that memory stays small, and stack."""
    return torch.stack([function(video) for video in frames])


def tally(model: Model, groups: Iterable[Clips], share: float | None) -> Counts:
    counts: Counts = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for clips in groups:
        for condition, right in judge(model, clips, share).items():
            for kind, ok in zip(
                clips.type_ids.flatten().tolist(), right.flatten().tolist(), strict=True
            ):
                if kind >= 0:
                    cell = counts[condition][TYPES[kind]]
                    cell[0] += ok
                    cell[1] += 1
    return counts


def summarise(counts: Mapping[str, Mapping[str, Sequence[int]]]) -> dict[str, dict[str, float]]:
    """Percentages by condition and type; `all` is the mean over the `n` questions."""
    report: dict[str, dict[str, float]] = {}
    for condition, by_type in counts.items():
        right, asked = (sum(cell[i] for cell in by_type.values()) for i in (0, 1))
        row = {kind: 100 * by_type[kind][0] / by_type[kind][1] for kind in TYPES if kind in by_type}
        report[condition] = {"all": 100 * right / asked, **row, "n": asked}
    return report


def print_report(report: Mapping[str, Mapping[str, float]], title: str) -> None:
    table = Table(title=title)
    table.add_column("condition")
    kinds = [kind for kind in ("all", *TYPES, "n") if any(kind in row for row in report.values())]
    for kind in kinds:
        table.add_column(kind, justify="right")
    chance = {
        "all": 100 * sum(CHANCE.values()) / len(CHANCE),
        **{k: 100 * v for k, v in CHANCE.items()},
    }
    for condition, row in (*report.items(), ("chance", chance)):
        table.add_row(condition, *(f"{row[kind]:.0f}" if kind in row else "" for kind in kinds))
    Console(width=200).print(table)


def rendered_clips(
    n_videos: int,
    n_frames: int,
    device: torch.device,
    *,
    videos_per_group: int = 16,
    seed: int = 0,
) -> Iterator[Clips]:
    """Held-out scenes rendered in memory and degraded as a codec would; other scenes by seed."""
    rng = random.Random(seed)
    noise = torch.Generator(device).manual_seed(seed)
    start = seed * n_videos
    for first in range(start, start + n_videos, videos_per_group):
        indices = range(first, min(first + videos_per_group, start + n_videos))
        batch = make_batch("heldout", indices, n_frames, 14, 12, rng, augment=False)
        yield _rendered(batch, device, noise)


def _rendered(batch: Batch, device: torch.device, noise: torch.Generator) -> Clips:
    scenes, times_s = batch.scenes.map(lambda x: x.to(device)), batch.times_s.to(device)
    frames = degrade(render(scenes, times_s), noise)
    things = token_labels(scenes, times_s)["shape"] != 0
    question_ids, answer_at, type_ids = (
        x.to(device) for x in (batch.question_ids, batch.answer_at, batch.type_ids)
    )
    return Clips(frames, question_ids, answer_at, type_ids, things.flatten(1).float())


def decoded_clips(manifest: Path, n_frames: int, device: torch.device) -> Iterator[Clips]:
    """Clips of a manifest, decoded from disk, one video at a time."""
    from .dataset import by_video, load, read_frames

    for video, items in by_video(load(manifest)).items():
        frames = read_frames(video, n_frames)[None].to(device)
        ids = pack_questions([[item.question for item in items]])
        yield Clips(frames, *(x.to(device) for x in ids))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--n-frames", type=int, default=32)
    parser.add_argument("--share", type=float, help="also keep this share of the tokens, e.g. 0.1")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_checkpoint(args.checkpoint)
    model.to(device)  # type: ignore[arg-type]
    clips = decoded_clips(args.manifest, args.n_frames, device)
    report = summarise(tally(model, clips, args.share))
    print_report(report, f"{args.manifest}, {args.n_frames} frames")
    if args.out:
        args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
