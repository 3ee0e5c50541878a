"""Train tiny-vla on one GPU in minutes, by imitation of scripted experts.

    python -m sims.collect --out DEMOS ...
    python -m policies.vla.tiny.train --seed 0 --minutes 8.5 --data DEMOS --out DIR

The loss is on the actions. Where the demonstrations say at which pixels hand, object and goal are
seen, a second loss asks the instruction's words to point at them; what points is shipped, because
it also tells which visual tokens matter before the decoder has run. No loss touches attention
weights, and no token is ever dropped in training.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...training import MuonAndAdam, Schedule
from ..openvla_model import Head, OpenVLA
from .demos import Batch, Demonstrations, Recording
from .modeling import make_config, make_model, make_tokenizer, save_checkpoint

REPORT_EVERY = 100
TASK_WEIGHT = {
    "metaworld:reach": 1.5,
    "metaworld:push": 3.0,
    "metaworld:pick-place": 4.0,
    "metaworld:plate-slide": 1.5,
    "metaworld:faucet-open": 1.5,
    "metaworld:faucet-close": 1.5,
    "metaworld:push-conveyor": 2.0,
}
"""How often the frames of a task are drawn, against 1: the ones that need an eye come more often.
"""
console = Console(width=160)


@dataclass(frozen=True, slots=True)
class Recipe:
    minutes: float = 8.5
    seed: int = 0
    head: Head = "parallel"
    batch: int = 256
    muon_lr: float = 1.5e-3
    adam_lr: float = 8e-4
    warmup_steps: int = 200
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    huber: float = 0.05
    pointing_weight: float = 0.05
    ema: float = 0.998
    vision_layers: int = 6
    layers: int = 6
    max_steps: int = 1_000_000


def imitation_loss(model: OpenVLA, rows: Tensor, batch: Batch, huber: float) -> Tensor:
    """rows [b, n, d] of `OpenVLA.forward` -> scalar."""
    said = model.action_head(rows).float()
    if model.is_parallel:
        loss = F.smooth_l1_loss(said, batch.actions, beta=huber, reduction="none").mean(-1)
        return (loss * batch.valid).sum() / batch.valid.sum()
    target = model.to_bins(batch.actions).flatten()
    loss = F.cross_entropy(said.flatten(0, 1), target, reduction="none")
    valid = batch.valid[..., None].expand_as(batch.actions).flatten()
    return (loss * valid).sum() / valid.sum()


def pointing_loss(model: OpenVLA, visual: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of the patch on which each thing is seen, among those of its camera."""
    b, cameras, height = batch.images.shape[:3]
    if model.pointer is None:
        return visual.new_zeros(())
    words = model.words(batch.text_ids)[:, 1:]
    place = torch.arange(words.shape[1], device=words.device)
    weight = (place < batch.text_length[:, None]).float()
    logits = model.point(visual, words, weight).view(b, cameras, model.side**2, -1).mT
    known = ~batch.pixels.isnan().any(-1)
    row, col = (batch.pixels.nan_to_num() * (model.side / height)).long().unbind(-1)
    target = row * model.side + col
    loss = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none")
    return (loss * known.flatten()).sum() / known.sum().clamp(min=1)


def losses(model: OpenVLA, batch: Batch, huber: float) -> tuple[Tensor, Tensor]:
    b, cameras = batch.images.shape[:2]
    camera = torch.arange(cameras, device=batch.images.device).repeat(b)
    visual = model.see(batch.images.flatten(0, 1), camera).unflatten(0, (b, cameras)).flatten(1, 2)
    rows = model(visual, batch.text_ids, batch.text_length, batch.state, batch.actions)
    return imitation_loss(model, rows, batch, huber), pointing_loss(model, visual, batch)


def without_mask_tensors(model: OpenVLA) -> None:
    """Let the compiled prefix run on the causal kernel.

    Under a compiler transformers spells out a causal mask; for an attention without a mask function
    it makes none, and hands over those it is given.
    """
    ALL_ATTENTION_FUNCTIONS.register("unmasked_sdpa", sdpa_attention_forward)
    model.language_model.set_attn_implementation("unmasked_sdpa")


def schedule_of(recipe: Recipe) -> Schedule:
    return Schedule(recipe.minutes, recipe.max_steps, recipe.warmup_steps, last=0.01)


def optimizer_for(recipe: Recipe, model: OpenVLA) -> MuonAndAdam:
    """Muon for the matrices of the towers, the projector and the decoder, AdamW for the rest."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and _is_inner(name)]
    rest = [p for name, p in named if not (p.ndim == 2 and _is_inner(name))]
    return MuonAndAdam(
        matrices,
        rest,
        muon_lr=recipe.muon_lr,
        adam_lr=recipe.adam_lr,
        beta2=0.95,
        weight_decay=recipe.weight_decay,
    )


def _is_inner(name: str) -> bool:
    return ".layers." in name or name.startswith("projector.")


def train(
    recipe: Recipe, demos: Demonstrations, model: OpenVLA, started_s: float
) -> tuple[OpenVLA, dict[str, float]]:
    """The moving average of the trained weights, in float32, and the cost of the run.

    started_s: monotonic time from which `recipe.minutes` count.
    """
    device = demos.images.device
    cuda = device.type == "cuda"
    torch.set_float32_matmul_precision("high")
    model.to(device).train()  # type: ignore[arg-type]
    without_mask_tensors(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema))
    optimizer, schedule = optimizer_for(recipe, model), schedule_of(recipe)
    run: Callable[..., tuple[Tensor, Tensor]] = losses
    if cuda:
        run = torch.compile(losses, fullgraph=True, dynamic=False)
    generator = torch.Generator(device).manual_seed(recipe.seed)
    seen = torch.zeros(2, device=device)
    step = 0
    for step in range(recipe.max_steps):
        elapsed_s = time.monotonic() - started_s
        if elapsed_s > 60 * recipe.minutes:
            break
        batch = demos.draw(recipe.batch, generator)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=cuda):
            imitation, pointing = run(model, batch, recipe.huber)
        (imitation + recipe.pointing_weight * pointing).backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step(schedule.share(step, elapsed_s))
        model.zero_grad(set_to_none=True)
        average.update_parameters(model)
        seen += torch.stack((imitation.detach(), pointing.detach()))
        if step % REPORT_EVERY == REPORT_EVERY - 1:
            actions, points = (seen / REPORT_EVERY).tolist()
            seen.zero_()
            line = f"{elapsed_s:.0f} s step {step + 1} actions {actions:.5f} pointing {points:.3f}"
            console.print(line, soft_wrap=True)
    trained = cast(OpenVLA, average.module)
    trained.language_model.set_attn_implementation("sdpa")
    cost = {"seconds": time.monotonic() - started_s, "steps": step + 1}
    trained.train(False)
    return trained, cost


def main() -> None:
    started_s = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__)
    for field in fields(Recipe):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(field.default), default=field.default)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="of sims.collect")
    parser.add_argument("--out", type=Path, required=True)
    args = vars(parser.parse_args())
    data, out = args.pop("data"), args.pop("out")
    recipe = Recipe(**args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recordings = [Recording.open(folder) for folder in data]
    about = recordings[0].about
    tokenizer = make_tokenizer(text for r in recordings for text in r.about["instructions"])
    state = np.concatenate([r.rows["state"] for r in recordings])
    mean, std = state.mean(0).tolist(), (state.std(0) + 1e-6).tolist()
    config = make_config(
        about["cameras"],
        len(tokenizer),
        state_mean=mean,
        state_std=std,
        action_size=recordings[0].rows["action"].shape[1],
        dt_s=about["dt_s"],
        pointers=recordings[0].rows["pixels"].shape[2],
        head=recipe.head,
        vision_layers=recipe.vision_layers,
        layers=recipe.layers,
    )
    demos = Demonstrations.of(recordings, tokenizer, mean, std, TASK_WEIGHT, device)
    console.print(f"{len(demos.last)} frames, {time.monotonic() - started_s:.0f} s")
    trained, cost = train(recipe, demos, make_model(config, recipe.seed), started_s)
    save_checkpoint(trained, tokenizer, out)
    notes = {"recipe": asdict(recipe), "cost": cost, "frames": len(demos.last)}
    (out / "training.json").write_text(json.dumps(notes, indent=1))
    console.print(notes)


if __name__ == "__main__":
    main()
