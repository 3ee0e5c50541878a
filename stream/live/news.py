"""Anchor mode: a segment's first frame at once, then only what the model has not seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stream.ops import picks, similarity
from stream.pipeline import EncodedVideo
from stream.plan import Plan
from stream.signals import Signal

_CUT_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class News:
    """plan: which patches of one frame reach the model. opens: it is a segment's first frame.
    changed: share of its patches that differ from what the model last saw there."""

    plan: Plan
    opens: bool
    changed: float


class LastSeen:
    """What the model last saw at each patch.

    Nothing is merged, for what is in a cache cannot be revised. A frame whose patches have changed
    for more than half, or the first after `max_segment_frames`, opens a segment: all its patches
    are new.
    """

    def __init__(self, tau: float, max_segment_frames: int) -> None:
        self._tau, self._longest = tau, max_segment_frames
        self._seen: Tensor | None = None
        self._frames = 0

    def news(self, frame: EncodedVideo, anchor_tokens: int, tokens: int) -> News:
        """frame: one grid frame. anchor_tokens, tokens: the most for a first frame, for others.

        The most salient of the new patches are taken; of the most changed, where there is no
        saliency. What changed but was not taken stays new.
        """
        alike = torch.full((frame.grid.size,), -1.0, device=frame.x.device)
        if self._seen is not None:
            alike = similarity.adjacent_cosine(torch.stack([self._seen, frame.x]))[0]
        new = alike <= self._tau
        changed = float(new.float().mean())
        opens = self._seen is None or self._frames >= self._longest or changed > _CUT_SHARE
        if opens:
            new = torch.ones_like(new)
        score = frame.signals.get(Signal.SALIENCY, -alike).masked_fill(~new, -torch.inf)
        count = min(anchor_tokens if opens else tokens, int(new.sum()))
        taken = picks.top(score, max(0, count))
        seen = frame.x if opens or self._seen is None else self._seen.clone()
        seen[taken] = frame.x[taken]
        self._seen, self._frames = seen, 1 if opens else self._frames + 1
        return News(Plan.keep(taken, frame.grid.size), opens, changed)

    def reset(self) -> None:
        """The next frame opens a segment."""
        self._seen = None
