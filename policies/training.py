"""How the shipped tiny models are optimised: Muon and AdamW, warm-up and a cosine over minutes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer


@dataclass(frozen=True, slots=True)
class Schedule:
    """Learning rates as a share of the full ones: warm-up by steps, then a cosine down to `last`.

    The cosine runs over `minutes` or `max_steps`, whichever would end first.
    """

    minutes: float
    max_steps: int
    warmup_steps: int
    last: float

    def share(self, step: int, elapsed_s: float) -> float:
        """Of step `step`, 0-based, which begins `elapsed_s` after the start."""
        done = max(elapsed_s / (60 * self.minutes), step / self.max_steps)
        cosine = self.last + (1 - self.last) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return cosine * min(1.0, (step + 1) / self.warmup_steps)


class MuonAndAdam:
    """Muon for inner matrices, with weight decay; AdamW for all other parameters, without."""

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        rest: Iterable[nn.Parameter],
        *,
        muon_lr: float,
        adam_lr: float,
        beta2: float,
        weight_decay: float,
    ) -> None:
        muon: Optimizer = torch.optim.Muon(
            matrices, lr=muon_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        adam: Optimizer = torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, beta2), weight_decay=0.0)
        self._full_rates = ((muon, muon_lr), (adam, adam_lr))

    def step(self, share: float) -> None:
        """Update by the gradients that are there, at a share of the full rates."""
        for optimizer, full in self._full_rates:
            for group in optimizer.param_groups:
                group["lr"] = share * full
            optimizer.step()
