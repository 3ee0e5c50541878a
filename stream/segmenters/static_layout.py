"""What HoliTom knows on the host: static windows, counts, and where everything will lie."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data import Segment
from ..ops import counts

Longs = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Windows:
    """Segments of a video and what stands still in them.

    segment: long [t], the segment of each frame; start: long [s], first frame of each segment.
    static: bool [s, p], patches that stand still through a segment of two frames or more.
    saved: tokens that collapsing the static patches saves.
    """

    segment: Longs
    start: Longs
    static: NDArray[np.bool_]
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
        return cls(segment, first, static, saved)

    @property
    def n_static(self) -> Longs:
        """long [s]: static patches of each segment."""
        return self.static.sum(1)

    @property
    def n_dynamic(self) -> Longs:
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


def published_counts(ratio: float, windows: Windows) -> tuple[Longs, Longs]:
    """(static tokens of each segment, dynamic tokens of each frame) with the paper's rounding."""
    static = [round(n * ratio) for n in windows.n_static.tolist()]
    dynamic = [math.ceil(n * ratio) for n in windows.n_dynamic.tolist()]
    return np.array(static, np.int64), np.array(dynamic, np.int64)


def exact_counts(tokens: int, windows: Windows) -> tuple[Longs, Longs]:
    """The same split in proportion to size, but meeting the budget exactly."""
    size = np.concatenate([windows.n_static, windows.n_dynamic])
    given = counts.allocate(size, size, tokens)
    segments = len(windows.start)
    return given[:segments], given[segments:]


@dataclass(frozen=True, slots=True)
class Layout[Vector]:
    """Where the members of a plan lie, before any score is known.

    Members are the tokens a plan is made of: first those that stand still, each for its window and
    anchored in its first frame, then those clustered within their frame, then those kept alone.
    Static patches of a window and clustered patches of a frame are groups, padded to the widest.
    All long:

    still: token of each static member.
    pick: of each other member, its place among the patches sorted frame by frame by score.
    pick_base: what makes the patches picked ascend as the members do; modulo n they are tokens.
    shift: added to a member's token gives its rank in the order of the plan's rows.
    entry, step, times: for each token that a member stands for, the member, how many tokens it
        lies after the member's own, and how many the member stands for.
    bag: [g * widest], the first entry of each padded place.
    place, base: padded place of each clustered member, and the first member of its group.
    size: [g], members of each group. near: [g], neighbours that make a point's density.
    centre, centre_base: as pick and pick_base, of the centres among the padded places.
    centre_shift: a centre's padded place less this is its member.
    alone: the members kept alone.
    """

    still: Vector
    pick: Vector
    pick_base: Vector
    shift: Vector
    entry: Vector
    step: Vector
    times: Vector
    bag: Vector
    place: Vector
    base: Vector
    size: Vector
    near: Vector
    centre: Vector
    centre_base: Vector
    centre_shift: Vector
    alone: Vector

    @classmethod
    def of(
        cls,
        windows: Windows,
        alone: Longs,
        static_count: Longs,
        by_clusters: Longs,
        neighbours: int,
        few_neighbours: bool,
        published_order: bool,
    ) -> Layout[Longs]:
        """alone, by_clusters: long [t], tokens of each frame kept alone and its clusters;
        static_count: long [s], clusters of each window. few_neighbours: no more than clusters."""
        patches, frames = windows.static.shape[1], len(windows.segment)
        n = frames * patches
        length = np.diff(windows.start, append=frames)

        size = np.concatenate([windows.n_static, windows.n_dynamic - alone])
        count = np.concatenate([static_count, by_clusters])
        group = ((size > 0) & (count > 0)).nonzero()[0]
        size, count = size[group], count[group]
        held = group[group < len(length)]
        moving = group[len(held) :] - len(length)

        window, patch = windows.static[held].nonzero()
        window = held[window]
        still_frame = windows.start[window]
        which, rank = ragged(size[len(held) :])
        near_frame = moving[which]
        lone_frame, lone_rank = ragged(alone)
        pick_frame = np.concatenate([near_frame, lone_frame])
        pick = pick_frame * patches + np.concatenate([rank + alone[near_frame], lone_rank])
        pick_base = pick_frame * patches
        pick_base[len(near_frame) :] += n

        frame = np.concatenate([still_frame, pick_frame])
        shift = np.zeros_like(frame)
        if published_order:
            after = 2 + 2 * frame
            after[: len(window)] = 0
            after[len(window) : len(window) + len(near_frame)] += 1
            shift = (windows.segment[frame] * (2 * frames + 2) + after - frame) * patches

        times = np.ones_like(frame)
        times[: len(window)] = length[window]
        entry, step = ragged(times)
        owner, within = ragged(size)
        widest = int(size.max(initial=0))
        place = owner * widest + within
        held_by = np.zeros(len(size) * widest, np.int64)
        held_by[place] = times[: len(place)]
        first = size.cumsum() - size
        leader, centre_rank = ragged(count)
        return Layout(
            still=still_frame * patches + patch,
            pick=pick,
            pick_base=pick_base,
            shift=shift,
            entry=entry,
            step=step * patches,
            times=times[entry],
            bag=held_by.cumsum() - held_by,
            place=place,
            base=first[owner],
            size=size,
            near=np.minimum(count if few_neighbours else size, neighbours),
            centre=leader * widest + centre_rank,
            centre_base=leader * widest,
            centre_shift=leader * widest - first[leader],
            alone=np.arange(len(place), len(frame)),
        )

    def on(self: Layout[Longs], device: torch.device) -> Layout[Tensor]:
        """The same in one copy, which does not wait for the device."""
        parts = [getattr(self, field.name) for field in fields(self)]
        whole = torch.from_numpy(np.concatenate(parts)).to(device, non_blocking=True)
        return Layout(*whole.split([len(part) for part in parts]))


def ragged(count: Longs) -> tuple[Longs, Longs]:
    """(row, place in it) of each cell of rows of `count` cells."""
    row = np.repeat(np.arange(len(count)), count)
    return row, np.arange(len(row)) - (count.cumsum() - count)[row]
