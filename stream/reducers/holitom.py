"""HoliTom: merge what stands still over time, keep the salient part of what moves.

Before the language model, one video at a time: static windows by dynamic programme, static
patches averaged over their window and clustered in space, the other patches chosen frame by
frame. Inside the model, `InnerMerge`. Source: HoliTom, arXiv 2505.21334.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from ..data import Budget, PatchGrid, Segment, VisualTokens
from ..memory import Memory
from ..ops import clusters, counts, merges, picks, similarity
from ..plan import Plan
from ..segmenters import static_windows
from ..signals import Signal, Signals
from .base import Reducer
from .inner_merge import InnerMerge


@dataclass(frozen=True, slots=True)
class Windows:
    """Segments of a video and what stands still in them.

    segment: long [t], the segment of each frame; start: long [s], first frame of each segment.
    static: bool [s, p], patches that stand still through a segment of two frames or more.
    saved: tokens that collapsing the static patches saves.
    """

    segment: Tensor
    start: Tensor
    static: Tensor
    saved: int

    @classmethod
    def of(cls, links: NDArray[np.bool_], segments: list[Segment]) -> Windows:
        """links: bool [t-1, p]; segments: a partition of the t frames."""
        frames, patches = links.shape[0] + 1, links.shape[1]
        broken = np.zeros((frames, patches), np.int64)
        broken[1:] = (~links).cumsum(0)
        first = np.array([s.start for s in segments])
        last = np.array([s.stop for s in segments]) - 1
        static = (broken[last] == broken[first]) & (last > first)[:, None]
        saved = int((static.sum(1) * (last - first)).sum())
        segment = np.repeat(np.arange(len(segments)), last - first + 1)
        return cls(
            torch.from_numpy(segment), torch.from_numpy(first), torch.from_numpy(static), saved
        )

    @property
    def n_static(self) -> Tensor:
        """long [s]: static patches of each segment."""
        return self.static.sum(1)

    @property
    def n_dynamic(self) -> Tensor:
        """long [t]: dynamic patches of each frame."""
        return (self.static.shape[1] - self.n_static)[self.segment]


def split_to_fit(links: NDArray[np.bool_], segments: list[Segment], tokens: int) -> Windows:
    """Halve the longest segments until the collapsed video holds at least `tokens` tokens.

    A still video may collapse to fewer tokens than the budget allows; the room is spent on time.
    """
    size = (links.shape[0] + 1) * links.shape[1]
    windows = Windows.of(links, segments)
    while size - windows.saved < tokens:
        longest = max(range(len(segments)), key=lambda i: (len(segments[i]), -i))
        whole = segments[longest]
        middle = whole.start + len(whole) // 2
        halves = [Segment(whole.start, middle), Segment(middle, whole.stop)]
        segments = segments[:longest] + halves + segments[longest + 1 :]
        windows = Windows.of(links, segments)
    return windows


def corrected_ratio(retain: float, size: int, saved: int) -> float:
    """The ratio to apply after the collapse so that about `retain` of all tokens remain."""
    return min(retain / ((size - saved) / size), 1.0)


def published_counts(ratio: float, windows: Windows) -> tuple[Tensor, Tensor]:
    """(static tokens of each segment, dynamic tokens of each frame) with the paper's rounding."""
    static = [round(n * ratio) for n in windows.n_static.tolist()]
    dynamic = [math.ceil(n * ratio) for n in windows.n_dynamic.tolist()]
    return torch.tensor(static), torch.tensor(dynamic)


def exact_counts(tokens: int, windows: Windows) -> tuple[Tensor, Tensor]:
    """The same split in proportion to size, but meeting the budget exactly."""
    size = torch.cat([windows.n_static, windows.n_dynamic])
    given = counts.allocate(size.double(), size, tokens)
    segments = windows.n_static.numel()
    return given[:segments], given[segments:]


class HoliTom(Reducer):
    """Spatio-temporal merging before the model, token merging inside it.

    The defaults are ours, chosen on the training split of tiny-video; `holitom_published` in
    configs/reducers/ holds the paper's.

    tau: cosine above which a patch stands still from one frame to the next.
    tau_quantile: if set, tau is this quantile of the video's own similarities instead; encoders
        differ too much in scale for one fixed tau.
    max_segment_frames: longest window; a long one collapses more, but says less about time.
    contextual: share of the dynamic tokens found by clustering instead of saliency (D).
    neighbours: neighbours that make a point's density (K).
    merge, beta: how a cluster is averaged; `beta` is the weight of its centre.
    static_saliency: exponent of saliency in the choice of static cluster centres; 0 ignores it.
    counts: how many tokens each window and frame gets. `exact` shares the budget in proportion to
        size and meets it; `published` rounds per frame and segment as the paper's code does and
        may miss it.
    order: `time` = ascending (t, y, x); `published` = static first, then frame by frame.
    inner: the merge inside the model, or None.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.SALIENCY})
    source: ClassVar[str] = "arXiv 2505.21334"

    tau: float = Field(default=0.8, ge=-1, le=1)
    tau_quantile: float | None = Field(default=None, ge=0, le=1)
    max_segment_frames: int = Field(default=8, ge=1)
    contextual: float = Field(default=0.0, ge=0, le=1)
    neighbours: int = Field(default=7, ge=1)
    merge: merges.MergeRule = "beta"
    beta: float = Field(default=0.6, ge=0, le=1)
    static_saliency: float = Field(default=4.0, ge=0)
    counts: Literal["exact", "published"] = "exact"
    order: Literal["time", "published"] = "time"
    inner: InnerMerge | None = InnerMerge(layer=5 / 6, drop=0.25)

    @property
    def stages(self) -> tuple[Reducer, ...]:
        return (self,) if self.inner is None else (self, self.inner)

    def plan(self, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory) -> Plan:
        self.require_whole_frames(tokens)
        links, segments = self.segments(tokens)
        saliency = signals[Signal.SALIENCY]
        if self.counts == "published":
            windows = Windows.of(links, segments)
            retain = budget.tokens / tokens.n
            ratio = corrected_ratio(retain, tokens.n, windows.saved)
            share = published_counts(ratio, windows)
        else:
            windows = split_to_fit(links, segments, budget.tokens)
            share = exact_counts(budget.tokens, windows)
        memory.state["segments"] = windows.start.tolist()
        return self.assemble(tokens.x, tokens.grid, saliency, windows, *share)

    def segments(self, tokens: VisualTokens) -> tuple[NDArray[np.bool_], list[Segment]]:
        """(links bool [t-1, p], the offline segments) of a whole video."""
        grid = tokens.grid
        alike = similarity.adjacent_cosine(tokens.x.view(grid.frames, grid.per_frame, -1))
        tau = self.tau
        if self.tau_quantile is not None and alike.numel():
            tau = float(np.quantile(alike.detach().cpu().numpy(), self.tau_quantile))
        links = (alike > tau).cpu().numpy()
        return links, static_windows.segment(links, self.max_segment_frames)[0]

    def assemble(
        self,
        x: Tensor,
        grid: PatchGrid,
        saliency: Tensor,
        windows: Windows,
        static_count: Tensor,
        dynamic_count: Tensor,
    ) -> Plan:
        """Choose and merge within given counts.

        x: [n, c]; saliency: [n]; windows, static_count (long [s]), dynamic_count (long [t]) are on
        the host, so every shape is known there and nothing waits for the device. Copies to it do
        not wait either: what lies in ordinary host memory is set aside before the call returns.
        """
        device, n, size = x.device, grid.size, grid.per_frame
        by_clusters = (
            dynamic_count - (dynamic_count.double() * (1 - self.contextual)).round().long()
        )
        alone_count = dynamic_count - by_clusters
        still = windows.static[windows.segment].to(device, non_blocking=True)
        score = saliency.view(-1, size).masked_fill(still, -torch.inf)
        alone = picks.top_mask(score, alone_count.to(device, non_blocking=True))

        groups = Groups.of(windows, alone_count, static_count, by_clusters)
        rows, alone_total = int(groups.count.sum()), int(alone_count.sum())
        token = picks.places(alone.view(-1), alone_total)
        place, parts = self._cluster(x, saliency, windows, groups, alone)
        centre, owner_place, col, weight = parts

        kept = torch.zeros(n + 1, dtype=torch.bool, device=device)
        kept[torch.where(centre, place, n).view(-1)] = True
        kept = kept[:n] | alone.view(-1)
        anchor = picks.places(kept, rows + alone_total)
        if self.order == "published":
            frame = anchor // size
            within = torch.where(still.view(-1)[anchor], 0, 2 + 2 * frame + ~alone.view(-1)[anchor])
            segment = windows.segment.to(device, non_blocking=True)[frame]
            key = (segment * (2 * grid.frames + 2) + within) * size + anchor % size
            anchor = anchor[torch.argsort(key)]
        slot = torch.zeros(n, dtype=torch.long, device=device)
        slot[anchor] = torch.arange(anchor.numel(), device=device)
        row = torch.cat([slot[owner_place], slot[token]])
        col = torch.cat([col, token])
        weight = torch.cat([weight, torch.ones(alone_total, device=device)])
        order = torch.argsort(row * n + col)
        return Plan(anchor, n, row[order], col[order], weight[order])

    def _cluster(
        self, x: Tensor, saliency: Tensor, windows: Windows, groups: Groups, alone: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """DPC-KNN within each group, padded to the widest.

        alone: bool [t, p], patches kept on their own. Returns the token that lends its position to
        each member long [g, w], and (centres bool [g, w]; for each token that a member stands for:
        the position of its cluster, its index and its weight, [e] each).
        """
        device, size = x.device, windows.static.shape[1]
        wide = groups.widest
        if wide == 0:
            none = torch.empty(0, dtype=torch.long, device=device)
            return none, (none.bool(), none, none, none.float())
        member = groups.members(windows, alone)
        patch = torch.sort(member.byte(), dim=1, descending=True, stable=True).indices[:, :wide]
        place = groups.first.to(device, non_blocking=True)[:, None] * size + patch

        slot, frame, share = (t.to(device, non_blocking=True) for t in groups.entries())
        col = frame * size + patch.reshape(-1)[slot]
        padded = Plan(place.view(-1), x.shape[0], slot, col, share)
        sizes = groups.size.to(device, non_blocking=True)
        valid = torch.arange(wide, device=device) < sizes[:, None]
        features = padded.apply(x).float().view(*place.shape, x.shape[1])
        distance = similarity.distances(similarity.centre_(features, sizes))
        near = groups.count if self.counts == "published" else groups.size
        density = clusters.density_peak_score(distance, near.clamp(max=self.neighbours), valid)
        if self.static_saliency:
            boost = padded.apply(saliency[:, None]).view(valid.shape).clamp_min(1e-12)
            density = torch.where(valid, density * boost**self.static_saliency, density)
        centre = picks.top_mask(density, groups.count.to(device, non_blocking=True))
        owner = clusters.assign(distance, centre)

        owner = owner + torch.arange(owner.shape[0], device=device)[:, None] * wide
        owner = owner.view(-1)
        weight = merges.cluster_weights(owner, valid.view(-1), self.merge, self.beta)
        return place, (centre, place.view(-1)[owner[slot]], col, weight[slot] * share)


@dataclass(frozen=True, slots=True)
class Groups:
    """What is clustered together: the static patches of a window, or patches of one frame.

    index: long [g], the window, or the number of windows plus the frame. first, frames: long [g],
    its first frame and how many. size: long [g], its members. count: long [g], its clusters.
    """

    index: Tensor
    first: Tensor
    frames: Tensor
    size: Tensor
    count: Tensor

    @classmethod
    def of(
        cls, windows: Windows, alone: Tensor, static_count: Tensor, by_clusters: Tensor
    ) -> Groups:
        """Groups with members and clusters; alone: long [t], patches of each frame outside them."""
        frames = windows.segment.numel()
        stop = torch.cat([windows.start[1:], torch.tensor([frames])])
        first = torch.cat([windows.start, torch.arange(frames)])
        length = torch.cat([stop - windows.start, torch.ones(frames, dtype=torch.long)])
        size = torch.cat([windows.n_static, windows.n_dynamic - alone])
        count = torch.cat([static_count, by_clusters])
        index = ((size > 0) & (count > 0)).nonzero().squeeze(-1)
        return cls(index, first[index], length[index], size[index], count[index])

    @property
    def widest(self) -> int:
        return int(self.size.max()) if self.size.numel() else 0

    def members(self, windows: Windows, alone: Tensor) -> Tensor:
        """bool [g, p], on the device of `alone` (bool [t, p])."""
        static = windows.static.to(alone.device, non_blocking=True)
        dynamic = ~static[windows.segment.to(alone.device, non_blocking=True)] & ~alone
        return torch.cat([static, dynamic])[self.index.to(alone.device, non_blocking=True)]

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens members stand for: (place in [g * widest], frame, share), [e], ascending."""
        group = torch.repeat_interleave(self.size)
        rank = torch.arange(group.numel()) - (self.size.cumsum(0) - self.size)[group]
        slot = group * self.widest + rank
        times = self.frames[group]
        entry = torch.repeat_interleave(times)
        step = torch.arange(entry.numel()) - (times.cumsum(0) - times)[entry]
        return slot[entry], self.first[group][entry] + step, (1.0 / times)[entry]
