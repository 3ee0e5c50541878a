"""HoliTom: merge what stands still over time, keep the salient part of what moves.

Before the language model, one video at a time: static windows by dynamic programme, static
patches averaged over their window and clustered in space, the other patches chosen frame by
frame. Inside the model, `InnerMerge`. Source: HoliTom, arXiv 2505.21334.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from ..data import Budget, PatchGrid, Segment, VisualTokens
from ..memory import Memory
from ..ops import clusters, merges, picks, similarity
from ..plan import Plan, weighted_sums
from ..segmenters import static_windows
from ..segmenters.static_layout import (
    Layout,
    Longs,
    Windows,
    corrected_ratio,
    exact_counts,
    published_counts,
    split_to_fit,
)
from ..signals import Signal, Signals
from .base import Reducer
from .inner_merge import InnerMerge


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
        static_count: Longs,
        dynamic_count: Longs,
    ) -> Plan:
        """Choose and merge within given counts.

        x: [n, c]; saliency: [n]; windows, static_count (long [s]), dynamic_count (long [t]) are on
        the host, so every shape is known there and nothing waits for the device.
        """
        device, n, size = x.device, grid.size, grid.per_frame
        published_order = self.order == "published"
        by_clusters = dynamic_count - (dynamic_count * (1 - self.contextual)).round().astype(int)
        layout = Layout.of(
            windows,
            dynamic_count - by_clusters,
            static_count,
            by_clusters,
            self.neighbours,
            few_neighbours=self.counts == "published",
            published_order=published_order,
        )
        at = layout.on(device)
        score = saliency.index_fill(0, at.still, -torch.inf).view(-1, size)
        picked = picks.top_places(score, at.pick, at.pick_base)
        clustered = layout.home.size - layout.seen.size
        if clustered:
            picked = torch.cat([picks.ordered(picked[:clustered])[0], picked[clustered:]])
        key = torch.cat([at.seen, picked])
        token = key % n if published_order else key
        owner = row = key[layout.home.size :]
        weight = torch.ones(row.shape, device=device)
        if layout.home.size:
            centre, own, share = self._cluster(x, saliency, layout, at, key, token)
            both = torch.cat([own, row, centre])
            owner, row = both[: key.numel()], both[layout.home.size :]
            weight = torch.cat([share, weight])
        rank = picks.ordered(row)[0]
        cell, order = picks.ordered(torch.add(token, owner, alpha=n))
        slot = torch.searchsorted(rank, cell // n)
        anchor = rank % n if published_order else rank
        return Plan(anchor, n, slot, cell % n, weight[order])

    def _cluster(
        self,
        x: Tensor,
        saliency: Tensor,
        layout: Layout[Longs],
        at: Layout[Tensor],
        key: Tensor,
        token: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """DPC-KNN within each group, padded to the widest.

        at: the layout on the device of x; key, token: of all entries. Returns the keys of the
        centres, and of each entry in a group its centre's key and its weight there.
        """
        shape = (layout.size.size, int(layout.size.max()))
        times = at.times.view(shape)
        valid = times > 0
        col, share = token[: layout.home.size], at.among.reciprocal()
        mean = partial(weighted_sums, col=col, start=at.bag, weight=share)
        features = similarity.centred(mean(x).view(*shape, -1), at.size)
        distance = similarity.distances(features)
        boost = None
        if self.static_saliency:
            boost = mean(saliency[:, None]).view(shape).clamp_min(1e-12) ** self.static_saliency
        most = int(layout.near.max())
        density = clusters.density_peak_score(distance, at.near, valid, boost=boost, most=most)
        place = picks.top_places(density, at.centre, at.centre_base)
        centre = torch.zeros_like(valid)
        centre.view(-1).index_fill_(0, place, True)
        owner = clusters.assign(distance, centre)
        weight = clusters.weights(owner, times, self.merge, self.beta).view(-1)
        first = key[at.first]
        return first[place], first[owner.view(-1)[at.home]], weight[at.home]
