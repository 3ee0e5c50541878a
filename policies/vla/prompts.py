"""Prompts of an OpenVLA-shaped policy: BOS, visual tokens, words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Prompts:
    """A batch of prompts, padded on the left.

    rows: [b, n, d]. position: long [b, n]; a missing camera leaves a gap. mask: bool [b, n], False
    for padding, None without any. pads: padding of each. text: tokens of the longest text, BOS
    included.
    """

    rows: Tensor
    position: Tensor
    mask: Tensor | None
    pads: tuple[int, ...]
    text: int

    @classmethod
    def of(
        cls, visual: Sequence[Tensor], words: Sequence[Tensor], places: Tensor, everything: int
    ) -> Self:
        """visual: [v, d] of each prompt, whose tokens stand at `places` (long [v]) among those of
        all cameras, `everything` in number. words: embedded text [t, d], BOS first."""
        text = max(len(each) for each in words)
        pads = tuple(text - len(each) for each in words)
        rows = [
            F.pad(torch.cat([w[:1], x.to(w.dtype), w[1:]]), (0, 0, pad, 0))
            for x, w, pad in zip(visual, words, pads, strict=True)
        ]
        place = torch.arange(places.numel() + text, device=places.device)
        gaps = torch.cat([places.new_zeros(1), 1 + places, 1 + everything + place[: text - 1]])
        if not any(pads):
            return cls(torch.stack(rows), gaps.expand(len(rows), -1), None, pads, text)
        pad = torch.tensor(pads, device=places.device)[:, None]
        position = gaps[(place - pad).clamp_min(0)]
        return cls(torch.stack(rows), position, place >= pad, pads, text)
