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

    segment: long [t], the segment of each frame.
    start, length: long [s], first frame and number of frames of each segment.
    static: bool [s, p], patches that stand still through a segment of two frames or more.
    n_static: long [s], how many these are. saved: tokens that collapsing them saves.
    """

    segment: Longs
    start: Longs
    length: Longs
    static: NDArray[np.bool_]
    n_static: Longs
    saved: int

    @classmethod
    def of(cls, links: NDArray[np.bool_], segments: list[Segment]) -> Windows:
        """links: bool [t-1, p]; segments: a partition of the t frames."""
        frames, patches = links.shape[0] + 1, links.shape[1]
        start = np.array([s.start for s in segments])
        length = np.array([len(s) for s in segments])
        held = np.zeros((frames, -(-patches // 8)), np.uint8)
        held[:-1] = np.packbits(links, axis=1)
        ends = np.stack([start, start + length - 1], axis=1).ravel()
        all_held = np.bitwise_and.reduceat(held, ends, axis=0)[::2]
        static = np.unpackbits(all_held, axis=1, count=patches).view(np.bool_)
        static &= (length > 1)[:, None]
        n_static = static.sum(1)
        saved = int(n_static @ (length - 1))
        segment = np.arange(len(segments)).repeat(length)
        return cls(segment, start, length, static, n_static, saved)

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
    """Where everything a plan is made of will lie, before any score is known.

    Members are the tokens a plan is made of: first those that stand still, each for its window and
    anchored in its first frame, then those clustered within their frame, then those kept alone.
    Entries are the tokens that members stand for, member by member: a still one has its patch's
    token in each frame of the window, every other one itself. Still patches of a window and
    clustered patches of a frame are groups, padded to the widest. A key is a token, plus a multiple
    of n if the plan's rows are not to be in the order of their tokens. All long:

    still: token of each patch that stands still, in every frame.
    seen: key of each entry that stands still.
    pick: of each other member, its place among the patches sorted frame by frame by score.
    pick_base: added to the patch picked gives its key.
    bag: [g * widest], the first entry of each padded place.
    times: [g * widest], how many entries it has; 0 where no member lies.
    first: [g * widest], as `bag`, but an entry also where no member lies.
    home, among: of each entry that is in a group, its padded place and the entries there.
    near: [g], neighbours that make a point's density.
    size: [g], members of each group.
    centre, centre_base: as pick and pick_base, of the centres among the padded places.
    """

    still: Vector
    seen: Vector
    pick: Vector
    pick_base: Vector
    bag: Vector
    times: Vector
    first: Vector
    home: Vector
    among: Vector
    near: Vector
    size: Vector
    centre: Vector
    centre_base: Vector

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
        size = np.concatenate([windows.n_static, windows.n_dynamic - alone])
        count = np.concatenate([static_count, by_clusters])
        group = ((size > 0) & (count > 0)).nonzero()[0]
        size, count = size[group], count[group]
        held = group[group < len(windows.start)]
        moving = group[len(held) :] - len(windows.start)

        owner, within = ragged(size)
        widest = int(size.max(initial=0))
        place = owner * widest + within
        window, patch = windows.static[held].nonzero()
        window = held[window]
        times = np.zeros(len(size) * widest, np.int64)
        times[place] = 1
        times[place[: len(window)]] = windows.length[window]
        bag = times.cumsum() - times
        home = np.arange(len(times)).repeat(times)

        member, step = ragged(windows.length[window])
        seen = (windows.start[window] * patches + patch)[member] + step * patches
        near_frame = moving.repeat(size[len(held) :])
        lone_frame, lone_rank = ragged(alone)
        pick_frame = np.concatenate([near_frame, lone_frame])
        rank = np.concatenate([within[len(window) :] + alone[near_frame], lone_rank])
        pick_base = pick_frame * patches
        pick = pick_base + rank
        if published_order:
            of_segment = windows.segment * (2 * frames + 2) * n
            seen = seen + of_segment[windows.start[window]][member]
            after = 2 + 2 * pick_frame
            after[: len(near_frame)] += 1
            pick_base = pick_base + of_segment[pick_frame] + after * n

        leader, centre_rank = ragged(count)
        centre_base = leader * widest
        return Layout(
            still=windows.static[windows.segment].ravel().nonzero()[0],
            seen=seen,
            pick=pick,
            pick_base=pick_base,
            bag=bag,
            times=times,
            first=np.minimum(bag, max(len(seen) + len(near_frame) - 1, 0)),
            home=home,
            among=times[home],
            near=np.minimum(count if few_neighbours else size, neighbours),
            size=size,
            centre=centre_base + centre_rank,
            centre_base=centre_base,
        )

    def on(self: Layout[Longs], device: torch.device) -> Layout[Tensor]:
        """The same in one copy, which does not wait for the device."""
        parts = [getattr(self, field.name) for field in fields(self)]
        whole = torch.from_numpy(np.concatenate(parts)).to(device, non_blocking=True)
        return Layout(*whole.split([len(part) for part in parts]))


def ragged(count: Longs) -> tuple[Longs, Longs]:
    """(row, place in it) of each cell of rows of `count` cells."""
    row = np.arange(len(count)).repeat(count)
    return row, np.arange(len(row)) - (count.cumsum() - count).repeat(count)
