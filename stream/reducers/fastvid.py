"""FastVID: scenes of a video, the salient tokens of each frame, and density merging in scenes."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..data import Budget, VisualTokens
from ..memory import Memory
from ..ops import clusters, counts, picks, similarity
from ..plan import Plan
from ..signals import Signal, Signals
from .base import Reducer


class FastVID(Reducer):
    """Salient tokens of every frame; in every few frames, tokens that average what is like them in
    the whole scene.

    A scene ends where consecutive frames are alike less than `tau`, and at the least alike places
    if there are fewer than `scenes`. Its anchor frames are every `stride`-th, counted from its
    end. The densest tokens of an anchor frame (DPC-KNN, salient ones aside) are its centres; each
    anchor frame on its own takes in all tokens of its scene that are not salient, so one token may
    count in several.

    The paper compares frames by the output of the encoder's pooling head and reads saliency off
    its query; here it is the mean of a frame's tokens and the attention that patches receive.
    Its counts are rounded down; these meet the budget.

    contextual: share of a frame's tokens that is given to centres; less where anchor frames could
        not hold that many. neighbours: of the density. beta: weight of a centre; the rest is its
        members' mean.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.SALIENCY})
    source: ClassVar[str] = "FastVID, NeurIPS 2025"

    tau: float = Field(default=0.9, ge=-1, le=1)
    scenes: int = Field(default=8, ge=1)
    contextual: float = Field(default=0.4, ge=0, le=1)
    stride: int = Field(default=4, ge=1)
    neighbours: int = Field(default=4, ge=1)
    beta: float = Field(default=0.6, ge=0, le=1)

    def plan(self, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory) -> Plan:
        self.require_whole_frames(tokens)
        frames, patches = tokens.grid.frames, tokens.grid.per_frame
        x = tokens.x.detach().float().view(frames, patches, -1)
        share = counts.evenly(budget.tokens, frames)
        room = (patches - int(share.max())) // max(self.stride - 1, 1)
        context = min(int(int(share.min()) * self.contextual), room)
        saliency = signals[Signal.SALIENCY].view(frames, patches)
        salient = picks.top_mask(saliency, (share - context).to(x.device))

        starts = self._starts(x)
        memory.state["segments"] = starts
        kept, entries = salient.clone(), []
        for start, stop in zip(starts, [*starts[1:], frames], strict=True):
            anchors = range(stop - 1, start - 1, -self.stride)
            quota = counts.evenly(context * (stop - start), len(anchors)).tolist()
            for frame, centres in zip(anchors, quota, strict=True):
                centre = self._centres(x[frame], ~salient[frame], centres)
                kept[frame] |= centre
                entries.append(self._merged(x, salient, range(start, stop), frame, centre))
        anchor = kept.flatten().nonzero().squeeze(-1)
        own = salient.flatten().nonzero().squeeze(-1)
        to, source, weight = (torch.cat(part) for part in zip(*entries, strict=True))
        row = (kept.flatten().cumsum(0) - 1)[torch.cat([own, to])]
        weight = torch.cat([torch.ones_like(own, dtype=weight.dtype), weight])
        return Plan.merge(anchor, row, torch.cat([own, source]), weight, tokens.n)

    def _starts(self, x: Tensor) -> list[int]:
        """The first frame of each scene; x: [t, p, d]."""
        frame = x.mean(1)
        alike = F.cosine_similarity(frame[:-1], frame[1:], dim=-1)
        cut = alike < self.tau
        cut[torch.sort(alike, stable=True).indices[: self.scenes - 1]] = True
        return [0, *(cut.nonzero().squeeze(-1) + 1).tolist()]

    def _centres(self, x: Tensor, valid: Tensor, k: int) -> Tensor:
        """bool [p]: the k densest tokens of a frame among the valid ones; x: [p, d]."""
        near = valid.sum().clamp(1, self.neighbours)[None]
        score = clusters.density_peak_score(similarity.distances(x[None]), near, valid[None])
        return picks.top_mask(score, torch.tensor([k], device=x.device))[0]

    def _merged(
        self, x: Tensor, salient: Tensor, scene: range, frame: int, centre: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(to long [e], from long [e], weight [e]): what the centres of a frame are made of."""
        patches = x.shape[1]
        target = centre.nonzero().squeeze(-1)
        if target.numel() == 0:
            return target, target, target.float()
        source = (~salient[scene.start : scene.stop]).flatten().nonzero().squeeze(-1)
        alike = similarity.cosine(x.flatten(0, 1)[scene.start * patches + source], x[frame, target])
        owner = target[alike.argmax(-1)]
        own = source - (frame - scene.start) * patches
        owner = torch.where(torch.isin(own, target), own, owner)
        size = torch.bincount(owner, minlength=patches)[owner]
        first = frame * patches
        to = torch.cat([owner, target]) + first
        taken = torch.cat([source + scene.start * patches, target + first])
        centre_weight = torch.full(target.shape, self.beta, device=x.device)
        return to, taken, torch.cat([(1 - self.beta) / size, centre_weight])
