"""VLA-Pruner: keep what the instruction looks at now and what the last actions looked at.

Two levels of relevance are joined, then thinned out: the top set of the prompt's attention in this
step, the top set of the action tokens' attention in the steps before, and of their union the
tokens that differ most. The frames of the patch grid are the cameras of one tick, so one step of a
robot with three cameras is a grid of three frames; a camera that is missing leaves no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..data import Budget, PatchGrid, VisualTokens
from ..errors import ValueShapeError
from ..memory import Memory
from ..ops import picks, spread
from ..ops.history import LONGEST, AttentionHistory, Glance, imputed, seen
from ..ops.replayed import replayable
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
        """All streams take every step together; they share a grid."""
        scores = [s[SIGNAL_OF[self.semantic]].detach() for s in signals]
        features = [
            (t.x if self.layer is None else s[Signal.INPUT_EMBEDDINGS]).detach()
            for t, s in zip(tokens, signals, strict=True)
        ]
        ready = [i for i, memory in enumerate(memories) if self.is_ready(memory)]
        kept: dict[int, Tensor] = {}
        if ready:
            place = torch.stack([tokens[i].index for i in ready])
            score = torch.stack([scores[i] for i in ready])
            histories = [_history(memories[i]) for i in ready]
            now_s = [max(tokens[i].pts_s) for i in ready]
            grid, k = tokens[0].grid, budget.tokens
            past = self._known(histories, now_s, grid, score.device)
            x = torch.cat([features[i] for i in ready])
            choose = partial(self._chosen, grid, k)
            (chosen,) = replayable((self, grid, k), choose, x, place, score, *past)
            kept = dict(zip(ready, chosen, strict=True))
        return [
            Plan.keep(kept[i], t.n) if i in kept else Plan.identity(t.n, t.x.device)
            for i, t in enumerate(tokens)
        ]

    def is_ready(self, memory: Memory) -> bool:
        return self.mode == "default" or len(_history(memory).glances) >= self.window

    def candidates(
        self,
        place: Tensor,
        semantic: Tensor,
        histories: Sequence[AttentionHistory],
        now_s: Sequence[float],
        grid: PatchGrid,
        k: int,
    ) -> tuple[Tensor, Tensor]:
        """(bool [b, g, p], long [b, g]): the union of the top sets, and how many of it may stay.

        A group is a camera in the default mode, the whole grid otherwise.
        place: long [b, n], of each token in the grid; semantic: float [b, n]; now_s: of each
        stream. Raises ValueShapeError if a history is of another grid.
        """
        past = self._known(histories, now_s, grid, semantic.device)
        return self._union(grid, k, place, semantic, *past)

    def _chosen(
        self,
        grid: PatchGrid,
        k: int,
        x: Tensor,
        place: Tensor,
        semantic: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor]:
        """(tokens that stay, in order, long [b, k],) of features [b * n, d]."""
        union, count = self._union(grid, k, place, semantic, *past)
        return (_thin_out(x, place, union, count, k, 2 * self._times * k),)

    def _known(
        self,
        histories: Sequence[AttentionHistory],
        now_s: Sequence[float],
        grid: PatchGrid,
        device: torch.device,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `_union` reads of the past: the weighted attention of each step, float32 [b, window,
        grid.size]; the even grid that stands in for it, float64 [b, p]; where it does, bool [b]."""
        phases = [self._refresh_phase(*one) for one in zip(histories, now_s, strict=True)]
        none = torch.zeros(grid.per_frame, dtype=torch.float64, device=device)
        even = [none if p is None else spread.even(grid.rows, grid.cols, p, device) for p in phases]
        turns = [none.new_full((), p is not None, dtype=torch.bool) for p in phases]
        past = self._weighted(histories, now_s, grid, device)
        return past, torch.stack(even), torch.stack(turns)

    def _union(
        self,
        grid: PatchGrid,
        k: int,
        place: Tensor,
        semantic: Tensor,
        past: Tensor,
        even: Tensor,
        turn: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """As `candidates`; past, even, turn: as `_known` says."""
        groups = grid.frames if self.mode == "default" else 1
        score = semantic.new_full((len(place), grid.size), -torch.inf).scatter_(1, place, semantic)
        absent = score == -torch.inf
        action = self._smoothed(past)
        if self.mode == "default":
            action = F.threshold(action, 0.0, -torch.inf)
        levels = torch.stack([score, action]).masked_fill_(absent, -torch.inf)
        levels = levels.view(2, len(place), groups, -1)
        count = self._share(levels, k)
        if self.mode == "default":
            even = even[:, None].masked_fill(absent.view(len(place), groups, -1), -torch.inf)
            levels[1] = torch.where(turn[:, None, None], even, levels[1])
        tops = picks.top_mask(levels, count * self._times) & (levels > -torch.inf)
        return tops.any(0), count

    def guide(
        self,
        histories: Sequence[AttentionHistory],
        now_s: Sequence[float],
        grid: PatchGrid,
        device: torch.device | str,
    ) -> Tensor:
        """Smoothed action attention, float32 [b, grid.size], each with sum 1; 0 where none is
        known."""
        return self._smoothed(self._weighted(histories, now_s, grid, device))

    def _weighted(
        self,
        histories: Sequence[AttentionHistory],
        now_s: Sequence[float],
        grid: PatchGrid,
        device: torch.device | str,
    ) -> Tensor:
        """Action attention of each step that counts, float32 [b, window, grid.size]."""
        glances: list[Glance] = []
        weights: list[float] = []
        for history, now in zip(histories, now_s, strict=True):
            past = self._past(history, now)
            for glance in past[:1]:
                _check_size(glance, grid)
            spare = self.window - len(past)
            glances += [*past, *(past[:1] or (Glance.blank(grid.size, device),)) * spare]
            weights += [*self.weights([max(now - g.time_s, 0.0) for g in past]), *[0.0] * spare]
        each = imputed(glances, self.half_life_s) if self.mode == "default" else seen(glances)
        torch._foreach_mul_(each.unbind(), weights)
        return each.view(len(histories), self.window, -1)

    def _smoothed(self, past: Tensor) -> Tensor:
        total = past.sum(1)
        total = total / total.sum(-1, keepdim=True).clamp_min(torch.finfo(total.dtype).tiny)
        return total.to(getattr(torch, self.guide_dtype)).float()

    def _past(self, history: AttentionHistory, now_s: float) -> tuple[Glance, ...]:
        """The steps that count, newest first."""
        past = history.glances[: -self.window - 1 : -1]
        if self.mode != "default":
            return past
        return tuple(g for g in past if now_s - g.time_s <= self.stale_s)

    def _refresh_phase(self, history: AttentionHistory, now_s: float) -> float | None:
        """Of the even grid that stands in for the action attention; None if nothing does."""
        if self.mode != "default" or not self.refresh_every or not self._past(history, now_s):
            return None
        turn, step = divmod(history.pushed, self.refresh_every)
        return turn * 0.6180339887498949 if step == 0 else None

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

    def _share(self, levels: Tensor, k: int) -> Tensor:
        """Tokens for each group, long [b, g], sum k: floors first, then the best scores anywhere.

        levels: [2, b, g, p], semantic and action scores, -inf where there is no token.
        """
        _, streams, groups, _ = levels.shape
        if groups == 1:
            return torch.full((streams, 1), k, device=levels.device)
        absent = levels[0] == -torch.inf
        score = _shares_of_one(levels.flatten(2)).sum(0).view_as(absent)
        score = score.masked_fill_(absent, -torch.inf)
        floor = picks.ranks(score) < int(self.camera_floor * k / groups)
        floored = score.masked_fill_(floor, torch.inf).masked_fill_(absent, -torch.inf)
        taken = picks.ranks(floored.view(streams, -1)) < k
        return taken.view_as(absent).sum(-1)


def _check_size(glance: Glance, grid: PatchGrid) -> None:
    if glance.value.numel() != grid.size:
        raise ValueShapeError(
            f"The action attention covers {glance.value.numel()} places, the grid "
            f"{grid.size}; begin a new episode when the cameras change."
        )


def _shares_of_one(score: Tensor) -> Tensor:
    """Scores [..., n] scaled to sum 1; 0 where they are -inf or NaN."""
    score = torch.nan_to_num(score, nan=0.0, posinf=torch.inf, neginf=0.0)
    return score / score.sum(-1, keepdim=True).clamp_min(torch.finfo(score.dtype).tiny)


def _thin_out(
    x: Tensor, place: Tensor, candidate: Tensor, count: Tensor, k: int, most: int
) -> Tensor:
    """The `count` most diverse candidates of each group, as tokens in order, long [b, k].

    x: [b * n, d]; place: long [b, n]; count: long [b, g], sum k; candidate: bool [b, g, p] with at
    least `count` and at most `most` in each group, so the filter runs on so many rows, without
    asking the device how many there are.
    """
    streams, n = place.shape
    token = torch.arange(streams * n, device=x.device).view(streams, n)
    row = torch.zeros_like(candidate, dtype=torch.long).view(streams, -1).scatter_(1, place, token)
    row = row.view_as(candidate)
    if most < candidate.shape[-1]:
        order = picks.best(candidate.byte(), most)
        row, candidate = row.gather(-1, order), candidate.gather(-1, order)
    width = candidate.shape[-1]
    picked = spread.farthest(x[row].flatten(0, 1), candidate.flatten(0, 1), min(k, width))
    beyond = torch.arange(picked.shape[1], device=x.device) >= count[..., None]
    chosen = row.gather(-1, picked.clamp_min_(0).view_as(beyond))
    chosen = chosen.masked_fill_(beyond, streams * n).flatten(1)
    return picks.ordered(chosen)[0][:, :k] % n
