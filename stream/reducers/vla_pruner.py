"""VLA-Pruner: keep what the instruction looks at now and what the last actions looked at.

Two levels of relevance are joined, then thinned out: the top set of the prompt's attention in this
step, the top set of the action tokens' attention in the steps before, and of their union the
tokens that differ most. The frames of the patch grid are the cameras of one tick, so one step of a
robot with three cameras is a grid of three frames; a camera that is missing leaves no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..data import Budget, PatchGrid, VisualTokens
from ..errors import ValueShapeError
from ..memory import Memory
from ..ops import picks, spread
from ..ops.history import LONGEST, AttentionHistory
from ..plan import Plan
from ..signals import Signal, Signals
from .base import BatchReducer, Site

Semantic = Literal["last", "prefill", "text"]

SIGNAL_OF: dict[str, Signal] = {
    "last": Signal.LAST_ROW,
    "prefill": Signal.PREFILL_ROWS,
    "text": Signal.TEXT_ROWS,
}
STATE = "vla_pruner"


def query_rows(semantic: Semantic, visual_stop: int, length: int) -> slice:
    """The prompt rows whose attention is averaged into a semantic score.

    visual_stop: place after the last visual token; length: tokens of the prompt. A text of fewer
    than three rows is taken whole.
    """
    if semantic == "last":
        return slice(length - 1, length)
    if semantic == "prefill":
        return slice(0, length)
    inner = slice(visual_stop + 1, length - 1)
    return inner if inner.start < inner.stop else slice(visual_stop, length)


def begin_episode(memory: Memory, epoch: int) -> None:
    """Forget all action attention. From here on, steps of an older epoch are not taken in.

    Call it after `memory.reset()`, with a number that grows from episode to episode; an inference
    that began before a reset still carries the old number, so what it saw never enters.
    """
    memory.state[STATE] = AttentionHistory(epoch)


def remember(
    memory: Memory, attention: Tensor, index: Tensor, grid: PatchGrid, *, time_s: float, epoch: int
) -> None:
    """Take in what the actions of a step looked at, once they are decoded.

    attention: float [m], mean over heads, action queries, layers (`action_layers`) and flow steps;
    index: long [m], the places in `grid` that were alive at those layers. time_s: when the
    step's pictures were taken, in the clock of `VisualTokens.pts_s`. epoch: of the episode in
    which the step's inference began. Errors: see `AttentionHistory.push`.
    """
    history: AttentionHistory = memory.state.get(STATE, AttentionHistory(epoch))
    memory.state[STATE] = history.push(attention, index, grid.size, time_s=time_s, epoch=epoch)


def _history(memory: Memory) -> AttentionHistory:
    history: AttentionHistory = memory.state.get(STATE, AttentionHistory())
    return history


class _NeedsOfSettings:
    """The signals an instance's settings ask for; on the class, those of the default settings."""

    def __get__(self, reducer: VLAPruner | None, owner: type[VLAPruner]) -> frozenset[Signal]:
        settings: Any = reducer or owner.model_construct()
        score = SIGNAL_OF[settings.semantic]
        return frozenset({score} if settings.layer is None else {score, Signal.INPUT_EMBEDDINGS})


class VLAPruner(BatchReducer):
    """Union of the prompt's and the past actions' top tokens, thinned to the most diverse.

    mode:
        `paper`: steps weigh gamma, gamma^2, ... from the newest on; action attention is the mean
            over the latter half of the layers; what was pruned counts as zero; nothing is pruned
            until `window` steps are known; all cameras share one budget.
        `released`: the same with the published code's reversed weights (the oldest step weighs
            most) and its one layer.
        `default`: steps weigh by their age in seconds, what was pruned keeps the value last seen,
            decayed; the top sets are wider; the budget holds from the first step on; see the
            settings below.
    layer: decoder layer at whose entry tokens are dropped, or share of the depth; null = before
        the model, where the semantic signal is what the adapter knows beforehand.
    semantic: which prompt rows make the semantic score, see `query_rows`.
    window, gamma: steps of action attention, and their decay per step (paper, released).
    guide_dtype: precision of the smoothed action attention; the released code ranks bfloat16.
    half_life_s: age at which a past step, or a value carried on, counts half.
    stale_s: steps older than this are not used; without any, semantics decide alone.
    refresh_every: every so many steps the action set gives way to an even grid, so that regions
        without action attention are seen again; null = never.
    camera_floor: least share of an even split that each camera keeps; the rest goes to the
        tokens with the most attention, wherever they are.
    reach: each top set holds so many times what may stay, and the filter chooses among them; 1 as
        published. Wider sets lean less on attention and more on diversity.
    """

    needs: ClassVar[frozenset[Signal]] = _NeedsOfSettings()  # type: ignore[assignment]
    source: ClassVar[str] = "arXiv 2511.16449"

    mode: Literal["default", "paper", "released"] = "default"
    layer: int | float | None = 3
    semantic: Semantic = "text"
    window: int = Field(default=3, ge=1, le=LONGEST)
    gamma: float = Field(default=0.8, gt=0, le=1)
    guide_dtype: Literal["float32", "bfloat16"] = "float32"
    half_life_s: float = Field(default=0.5, gt=0)
    stale_s: float = Field(default=2.0, ge=0)
    refresh_every: int | None = Field(default=10, ge=2)
    camera_floor: float = Field(default=0.25, ge=0, le=1)
    reach: int = Field(default=4, ge=1)

    @property
    def site(self) -> Site:
        return Site(self.layer)

    @property
    def counts(self) -> Literal["exact", "published"]:
        """`published`: while warming up, `plan` keeps all tokens, whatever `keeps` says."""
        return "exact" if self.mode == "default" else "published"

    def action_layers(self, depth: int) -> range:
        """The decoder layers, of `depth`, whose action attention `remember` wants."""
        if self.mode == "released":
            one = round(15 / 31 * (depth - 1))
            return range(one, one + 1)
        return range(depth // 2, depth)

    def plan_batch(
        self,
        tokens: Sequence[VisualTokens],
        signals: Sequence[Signals],
        budget: Budget,
        memories: Sequence[Memory],
    ) -> list[Plan]:
        """The filter, a chain of as many picks as the budget, runs once for all streams."""
        k, plans = budget.tokens, [Plan.identity(t.n, t.x.device) for t in tokens]
        ready, features, unions, counts = [], [], [], []
        for i, (video, memory) in enumerate(zip(tokens, memories, strict=True)):
            semantic = signals[i][SIGNAL_OF[self.semantic]].detach()
            x = video.x if self.layer is None else signals[i][Signal.INPUT_EMBEDDINGS]
            if not self.is_ready(memory):
                continue
            union, count = self.candidates(video, semantic, _history(memory), k)
            ready.append(i)
            features.append(_on_grid(x.detach(), video, 0.0))
            unions.append(union)
            counts.append(count)
        if ready:
            most = 2 * self._times * k
            kept = _thin_out(torch.cat(features), torch.cat(unions), torch.cat(counts), k, most)
            for i, own in zip(ready, kept.view(len(ready), -1), strict=True):
                plans[i] = Plan.keep(picks.places(own[tokens[i].index], k), tokens[i].n)
        return plans

    def is_ready(self, memory: Memory) -> bool:
        return self.mode == "default" or len(_history(memory).glances) >= self.window

    def candidates(
        self, tokens: VisualTokens, semantic: Tensor, history: AttentionHistory, k: int
    ) -> tuple[Tensor, Tensor]:
        """(bool [g, p], long [g]): the union of the top sets, and how many of it may stay.

        A group is a camera in the default mode, the whole grid otherwise. semantic: float [n].
        Raises ValueShapeError if the history is of another grid.
        """
        grid = tokens.grid
        groups = grid.frames if self.mode == "default" else 1
        present = _on_grid(torch.ones_like(semantic, dtype=torch.bool), tokens, False)
        present = present.view(groups, -1)
        score = _on_grid(semantic, tokens, -torch.inf).view(groups, -1)
        guide = self.guide(history, max(tokens.pts_s), grid)
        if guide is None:
            count = self._share(_shares_of_one(score, present), present, k)
            return picks.top_mask(score, count * self._times) & present, count
        action = guide.view(groups, -1).masked_fill(~present, -torch.inf)
        both = _shares_of_one(score, present) + _shares_of_one(action, present)
        count = self._share(both, present, k)
        reached = count * self._times
        if self.mode != "default":
            second = picks.top_mask(action, reached)
        elif self.refresh_every and history.pushed % self.refresh_every == 0:
            phase = history.pushed // self.refresh_every * 0.6180339887498949
            even = spread.even(grid.rows, grid.cols, phase, present.device)
            second = picks.top_mask(torch.where(present, even, -torch.inf), reached)
        else:
            second = picks.top_mask(action, reached) & (action > 0)
        return (picks.top_mask(score, reached) | second) & present, count

    def guide(self, history: AttentionHistory, now_s: float, grid: PatchGrid) -> Tensor | None:
        """Smoothed action attention, float32 [grid.size] with sum 1; None where none is known."""
        past = history.glances[: -self.window - 1 : -1]
        if self.mode == "default":
            past = tuple(g for g in past if now_s - g.time_s <= self.stale_s)
        if not past:
            return None
        if past[0].value.numel() != grid.size:
            raise ValueShapeError(
                f"The action attention covers {past[0].value.numel()} places, the grid "
                f"{grid.size}; begin a new episode when the cameras change."
            )
        total = torch.zeros_like(past[0].value)
        ages_s = [max(now_s - g.time_s, 0.0) for g in past]
        for weight, glance in zip(self.weights(ages_s), past, strict=True):
            impute = self.mode == "default"
            value = glance.imputed(self.half_life_s) if impute else glance.zero_filled()
            total = total + weight * value
        total = total / total.sum().clamp_min(torch.finfo(total.dtype).tiny)
        return total.to(getattr(torch, self.guide_dtype)).float()

    def weights(self, ages_s: list[float]) -> list[float]:
        """Weight of each past step, newest first. ages_s: newest first, seconds."""
        steps = len(ages_s)
        if self.mode == "released":
            return [self.gamma ** (steps - 1 - i) for i in range(steps)]
        if self.mode == "paper":
            return [self.gamma ** (i + 1) for i in range(steps)]
        return [2.0 ** (-age / self.half_life_s) for age in ages_s]

    @property
    def _times(self) -> int:
        """Size of a top set, as a multiple of what may stay."""
        return self.reach if self.mode == "default" else 1

    def _share(self, score: Tensor, present: Tensor, k: int) -> Tensor:
        """Tokens for each group, long [g], sum k: floors first, then to the best scores anywhere.

        score: [g, p], -inf where not present.
        """
        groups = score.shape[0]
        total = torch.full((1,), k, device=score.device)
        if groups == 1:
            return total
        floor = torch.full((groups,), int(self.camera_floor * k / groups), device=score.device)
        floored = score.masked_fill(picks.top_mask(score, floor) & present, torch.inf)
        taken = picks.top_mask(floored.view(1, -1), total)
        return taken.view(groups, -1).sum(-1)


def _on_grid(x: Tensor, tokens: VisualTokens, absent: float) -> Tensor:
    """x [n, ...] at its places: [grid.size, ...]; `absent` where the grid has no token."""
    out = x.new_full((tokens.grid.size, *x.shape[1:]), absent)
    return out.index_copy_(0, tokens.index, x)


def _shares_of_one(score: Tensor, present: Tensor) -> Tensor:
    """Scores scaled to sum 1 over what is present; -inf elsewhere."""
    total = torch.where(present, score, 0.0).sum()
    return score / total.clamp_min(torch.finfo(score.dtype).tiny)


def _thin_out(x: Tensor, candidate: Tensor, count: Tensor, k: int, most: int) -> Tensor:
    """The `count` most diverse candidates of each group, bool [g * p], k in all of a stream.

    x: [g * p, d]; candidate: bool [g, p] with at least `count` (long [g]) and at most `most` in
    each group, so the filter runs on so many rows, without asking the device how many there are.
    """
    groups, size = candidate.shape
    width = min(most, size)
    order = torch.sort(candidate.byte(), dim=-1, descending=True, stable=True).indices[:, :width]
    place = order + torch.arange(groups, device=x.device)[:, None] * size
    chosen = spread.farthest(x[place], candidate.gather(1, order), min(k, width))
    within = torch.arange(chosen.shape[1], device=x.device) < count[:, None]
    spare = torch.zeros(groups, width + 1, dtype=torch.bool, device=x.device)
    kept = spare.scatter_(1, torch.where(within, chosen, width), True)[:, :width]
    out = torch.zeros(groups * size, dtype=torch.bool, device=x.device)
    return out.index_put_((place,), kept)
