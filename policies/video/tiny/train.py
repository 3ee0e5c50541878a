"""Train tiny-video on one GPU in minutes; frames are rendered where they are used.

    python -m policies.video.tiny.train --seed 0 --minutes 8.6 --out DIR

Two losses on what the language model reads and says: the answers, and what each visual token shows
(colour and shape of the thing on it, surface behind it). No loss touches attention weights, and no
token is ever dropped in training.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ...training import MuonAndAdam, Schedule
from .batches import Batch, TrainingBatches
from .codec import degrade
from .evaluate import print_report, rendered_clips, summarise, tally
from .modeling import Model, make_model, save_checkpoint, vocabulary
from .packed import PLAIN, Kernels, frame_tokens, question_states, visual_positions
from .questions import TYPES
from .render import GRID, render, token_labels
from .world import COLORS, SHAPES, SURFACES, ZONES

LABEL_WORDS = {"color": tuple(COLORS), "shape": SHAPES, "surface": SURFACES, "zone": ZONES}
console = Console(width=160)


@dataclass(frozen=True, slots=True)
class Recipe:
    minutes: float = 8.6
    seed: int = 0
    muon_lr: float = 2e-3
    adam_lr: float = 1e-3
    warmup_steps: int = 150
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    shown_weight: float = 1.0
    found_weight: float = 0.2
    frames_per_step: int = 384
    n_questions: int = 12
    n_workers: int = 12
    validation_videos: int = 128
    max_steps: int = 1_000_000


def answer_loss(model: Model, states: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the answer word and a little of the end token; also which answers were
    right.

    states [B, Q, L, d] -> loss, right [B, Q] bool.
    """
    at = batch.answer_at[..., None]
    reading = torch.cat((at - 1, at), dim=-1)[..., None].expand(-1, -1, -1, states.shape[-1])
    logits = model.lm_head(states.gather(2, reading)).float()
    target = batch.question_ids.gather(2, torch.cat((at, at + 1), dim=-1))
    loss = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none")
    loss = loss.view_as(target)
    return loss[..., 0].mean() + 0.1 * loss[..., 1].mean(), logits[:, :, 0].argmax(-1) == target[
        ..., 0
    ]


class TokenLosses(nn.Module):
    """What each visual token shows, and where the nearest thing is.

    Shown: in the language model's own word embeddings, a token on a red ring should be close to
    `red` and to `ring`, one on the background close to a learnt "nothing"; every token should be
    close to its shot's surface and to its own place. Things and background weigh the same.

    Found: what the last vision layer's attention adds to a token should tell the row and the column
    of the nearest thing. Without it that layer looks away from small things, so its attention says
    nothing about them. The attention weights themselves have no target.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        ids = vocabulary()
        config: Any = model.config
        self.nothing = nn.Parameter(torch.zeros(2, config.text_config.hidden_size))
        self.place = nn.Linear(config.vision_config.hidden_size, 2 * GRID)
        for name, words in LABEL_WORDS.items():
            self.register_buffer(name, torch.tensor([ids[word] for word in words]))

    def shown(self, model: Model, tokens: Tensor, labels: dict[str, Tensor]) -> Tensor:
        """tokens [B, T * 196, d], labels of `token_labels` -> scalar."""
        embedding = model.model.language_model.embed_tokens
        total = tokens.new_zeros((), dtype=torch.float32)
        for i, name in enumerate(LABEL_WORDS):
            choices = embedding(getattr(self, name))
            if name in ("color", "shape"):
                choices = torch.cat((self.nothing[i : i + 1], choices))
            logits = F.linear(tokens, choices).float() * tokens.shape[-1] ** -0.5
            target = labels[name].flatten()
            loss = F.cross_entropy(logits.flatten(0, 1), target, reduction="none")
            if name in ("color", "shape"):
                thing, background = target > 0, target == 0
                total = total + (loss * thing).sum() / thing.sum().clamp(min=1)
                total = total + (loss * background).sum() / background.sum().clamp(min=1)
            else:
                total = total + loss.sum() / (target >= 0).sum()
        return total / len(LABEL_WORDS)

    def found(self, attended: Tensor, labels: dict[str, Tensor]) -> Tensor:
        """attended [B, T * 196, d_vision], labels of `token_labels` -> scalar."""
        row, column = self.place(attended).float().flatten(0, 1).chunk(2, dim=-1)
        losses = [
            F.cross_entropy(logits, labels[name].flatten(), reduction="sum")
            for logits, name in ((row, "row"), (column, "column"))
        ]
        return (losses[0] + losses[1]) / (labels["row"] >= 0).sum().clamp(min=1)


def schedule_of(recipe: Recipe) -> Schedule:
    return Schedule(recipe.minutes, recipe.max_steps, recipe.warmup_steps, last=0.02)


def optimizer_for(recipe: Recipe, model: Model, extra: nn.Module) -> MuonAndAdam:
    """Muon for the matrices of both towers, AdamW for embeddings, norms and biases."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and (".layers." in name or "linear_" in name)]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen] + list(extra.parameters())
    return MuonAndAdam(
        matrices,
        rest,
        muon_lr=recipe.muon_lr,
        adam_lr=recipe.adam_lr,
        beta2=0.98,
        weight_decay=recipe.weight_decay,
    )


def training_batches(recipe: Recipe) -> Iterator[Batch]:
    loader = DataLoader(
        TrainingBatches(recipe.seed, recipe.frames_per_step, recipe.n_questions),
        batch_size=None,
        num_workers=recipe.n_workers,
        prefetch_factor=4 if recipe.n_workers else None,
    )
    return iter(loader)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors on a device; copies do not make the host wait."""

    def move(x: Tensor) -> Tensor:
        return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x

    names = ("times_s", "frame_scale", "question_ids", "answer_at", "type_ids")
    moved = {name: move(getattr(batch, name)) for name in names}
    return Batch(scenes=batch.scenes.map(move), grid=batch.grid, **moved)


class Progress:
    """Running accuracy by type, printed now and then without stalling the GPU in between."""

    def __init__(self, device: torch.device) -> None:
        self.right = torch.zeros(len(TYPES), 2, device=device)

    def add(self, type_ids: Tensor, right: Tensor) -> None:
        pairs = torch.stack((right.flatten().float(), torch.ones_like(right.flatten()).float()), 1)
        self.right.index_add_(0, type_ids.flatten(), pairs)

    def line(self) -> str:
        right, asked = self.right.T.tolist()
        self.right.zero_()
        rates = (
            f"{t} {100 * r / max(n, 1):.0f}" for t, r, n in zip(TYPES, right, asked, strict=True)
        )
        return f"{100 * sum(right) / max(sum(asked), 1):.1f} | " + " ".join(rates)


def train(recipe: Recipe, device: torch.device) -> tuple[Model, dict[str, float]]:
    """The trained model in float32 and the cost of the run."""
    started_s = time.monotonic()
    cuda = device.type == "cuda"
    torch.set_float32_matmul_precision("high")
    model = make_model(recipe.seed).train()
    model.to(device)
    token_losses = TokenLosses(model).to(device)
    optimizer, schedule = optimizer_for(recipe, model, token_losses), schedule_of(recipe)
    run = Kernels.compiled() if cuda else PLAIN
    dtype = torch.bfloat16 if cuda else torch.float32
    noise = torch.Generator(device).manual_seed(recipe.seed)
    progress = Progress(device)
    n_videos = 0
    step = 0
    for step, cpu_batch in enumerate(training_batches(recipe)):
        elapsed_s = time.monotonic() - started_s
        if elapsed_s > 60 * recipe.minutes or step >= recipe.max_steps:
            break
        batch = on_device(cpu_batch, device)
        with torch.no_grad():
            frames = degrade(render(batch.scenes, batch.times_s), noise).to(dtype)
            labels = token_labels(batch.scenes, batch.times_s)
        positions, start = visual_positions(batch.frame_scale, batch.grid)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=cuda):
            tokens = frame_tokens(model, frames, batch.grid, run)
            states = question_states(model, tokens.read, positions, start, batch.question_ids, run)
            said, right = answer_loss(model, states, batch)
            shown = token_losses.shown(model, tokens.finest, labels)
            found = token_losses.found(tokens.attended, labels)
        model.zero_grad(set_to_none=True)
        token_losses.zero_grad(set_to_none=True)
        (said + recipe.shown_weight * shown + recipe.found_weight * found).backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step(schedule.share(step, elapsed_s))
        progress.add(batch.type_ids, right)
        n_videos += len(batch.times_s)
        if step % 100 == 99:
            losses = f"answer {said:.3f} shown {shown:.3f} found {found:.3f}"
            line = f"{elapsed_s:.0f} s step {step + 1} {losses} | {progress.line()}"
            console.print(line, soft_wrap=True)
    cost = {"seconds": time.monotonic() - started_s, "steps": step, "videos": n_videos}
    return model.eval(), cost


def validate(
    model: Model, recipe: Recipe, device: torch.device
) -> dict[str, dict[str, dict[str, float]]]:
    """Held-out scenes at 32 frames with 10 % of the tokens, and whole at 16 and 8."""
    reports = {}
    for n_frames, share in ((32, 0.1), (16, None), (8, None)):
        clips = rendered_clips(recipe.validation_videos, n_frames, device)
        reports[f"{n_frames} frames"] = summarise(tally(model, clips, share))
        print_report(reports[f"{n_frames} frames"], f"held-out scenes, {n_frames} frames")
    return reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for field in fields(Recipe):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(field.default), default=field.default)
    parser.add_argument("--out", type=Path, required=True)
    args = vars(parser.parse_args())
    out: Path = args.pop("out")
    recipe = Recipe(**args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, cost = train(recipe, device)
    save_checkpoint(model, out)
    console.print(cost)
    metrics = {"recipe": asdict(recipe), "cost": cost, "accuracy": validate(model, recipe, device)}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1))


if __name__ == "__main__":
    main()
