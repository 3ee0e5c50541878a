"""Static windows against exhaustive search, and online against offline."""

from __future__ import annotations

import copy
import itertools
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from stream.data import Segment
from stream.errors import ConfigError, ValueShapeError
from stream.segmenters.static_windows import StaticWindows, segment

Links = NDArray[np.bool_]


def gain(links: Links, start: int, stop: int) -> int:
    static = [all(links[t, p] for t in range(start, stop - 1)) for p in range(links.shape[1])]
    return sum(static) * (stop - 1 - start)


def total_gain(links: Links, segments: list[Segment]) -> int:
    return sum(gain(links, s.start, s.stop) for s in segments)


def exhaustive(links: Links, max_frames: int) -> tuple[list[Segment], int]:
    """Best of all partitions; of equals the one whose last window is shortest, then the one
    before it, and so on."""
    frames = len(links) + 1
    ranked = []
    for cuts in itertools.product((False, True), repeat=frames - 1):
        bounds = [0, *(t + 1 for t, cut in enumerate(cuts) if cut), frames]
        parts = [Segment(a, b) for a, b in itertools.pairwise(bounds)]
        if max(map(len, parts)) <= max_frames:
            backwards = [len(s) for s in reversed(parts)]
            ranked.append((-total_gain(links, parts), backwards, parts))
    best = min(ranked, key=lambda item: item[:2])
    return best[2], -best[0]


def by_table(links: Links, max_frames: int) -> tuple[list[Segment], int]:
    """The textbook dynamic programme over a whole video, for lengths beyond exhaustion."""
    frames = len(links) + 1
    best, window = [0], [0]
    for stop in range(1, frames + 1):
        options = [
            (best[stop - w] + gain(links, stop - w, stop), -w)
            for w in range(1, min(stop, max_frames) + 1)
        ]
        value, width = max(options)
        best.append(value)
        window.append(-width)
    segments, stop = [], frames
    while stop:
        segments.append(Segment(stop - window[stop], stop))
        stop -= window[stop]
    return segments[::-1], best[-1]


def push_all(links: Links, windows: StaticWindows) -> tuple[list[Segment], list[Segment]]:
    """What the pushes gave, and what the flush gave."""
    pushed = windows.push(None)
    for row in links:
        pushed += windows.push(row)
    return pushed, windows.flush()


def drawn_links(rng: np.random.Generator, frames: int) -> Links:
    """Few patches and even odds make ties; sticky patches make long windows."""
    patches = int(rng.integers(1, 5))
    rate = rng.choice([0.0, 0.3, 0.5, 0.8, 0.95, 1.0])
    links = rng.random((frames - 1, patches)) < rate
    if rng.random() < 0.4 and frames > 2:  # blocks: equal gains at several cuts
        links = np.repeat(links[::2], 2, axis=0)[: frames - 1]
    return np.asarray(links, bool)


def test_offline_is_the_exhaustive_optimum_ties_included() -> None:
    rng = np.random.default_rng(0)
    ties = 0
    for _ in range(600):
        links = drawn_links(rng, int(rng.integers(1, 8)))
        max_frames = int(rng.choice([1, 2, 3, 5, 1024]))
        expected = exhaustive(links, max_frames)
        assert segment(links, max_frames) == expected
        parts = [[Segment(t, t + 1) for t in range(len(links) + 1)], expected[0]]
        ties += parts[0] != parts[1] and total_gain(links, parts[0]) == expected[1]
        ties += expected[1] == 0 and len(links) > 0
    assert ties > 50  # the cases do hold ties


def test_the_table_is_the_exhaustive_optimum() -> None:
    """The slow reference of the tests below is itself held against exhaustion."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        links = drawn_links(rng, int(rng.integers(1, 8)))
        max_frames = int(rng.choice([1, 2, 4, 1024]))
        assert by_table(links, max_frames) == exhaustive(links, max_frames)


@pytest.mark.parametrize("seed", range(4))
def test_online_equals_offline_for_a_long_lag(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    early = 0
    for _ in range(300):
        frames = int(rng.integers(1, 25))
        links = drawn_links(rng, frames)
        max_frames = int(rng.choice([2, 4, 7, 1024]))
        expected, saved = by_table(links, max_frames)
        for lag in (None, frames, frames + 3):
            windows = StaticWindows(max_frames, lag)
            pushed, flushed = push_all(links, windows)
            assert pushed + flushed == expected
            assert windows.saved_tokens == saved
            early += bool(pushed)
    assert early > 100  # boundaries are committed before the end, not all by the flush


link_rows = st.integers(1, 3).flatmap(
    lambda p: st.lists(st.lists(st.booleans(), min_size=p, max_size=p), min_size=1, max_size=14)
)


@given(link_rows, st.integers(1, 6), st.sampled_from([None, 15, 40]))
def test_online_equals_offline(rows: list[list[bool]], max_frames: int, lag: int | None) -> None:
    links = np.array(rows)
    pushed, flushed = push_all(links, StaticWindows(max_frames, lag))
    assert pushed + flushed == by_table(links, max_frames)[0]


@given(link_rows, st.integers(1, 6), st.integers(0, 6))
def test_a_short_lag_still_gives_a_partition_in_time(
    rows: list[list[bool]], max_frames: int, lag: int
) -> None:
    links = np.array(rows)
    windows = StaticWindows(max_frames, lag)
    done: list[Segment] = []
    for row in (None, *links):
        done += windows.push(row)
        committed = done[-1].stop if done else 0
        assert windows.frames - committed < lag + max_frames
        left = copy.deepcopy(windows).flush()
        if left:  # no boundary of the best partition is older than the lag and still open
            assert left[0].start == committed
            assert left[0].stop > windows.frames - lag
        assert total_gain(links, done + left) == windows.saved_tokens
    done += windows.flush()
    assert [s.start for s in done] == [0, *(s.stop for s in done[:-1])]
    assert done[-1].stop == len(links) + 1
    assert max(map(len, done)) <= max_frames
    assert total_gain(links, done) <= by_table(links, max_frames)[1]


def test_by_hand() -> None:
    """One still patch throughout, one that moves once: the whole beats the halves."""
    links = np.array([[1, 1], [1, 0], [1, 1]], bool)
    assert segment(links) == ([Segment(0, 2), Segment(2, 4)], 4)
    links = np.array([[1, 1, 1]] * 3, bool)
    assert segment(links) == ([Segment(0, 4)], 9)
    assert segment(np.zeros((3, 5), bool)) == ([Segment(t, t + 1) for t in range(4)], 0)
    assert segment(np.zeros((0, 5), bool)) == ([Segment(0, 1)], 0)


def test_certain_boundaries_come_at_once() -> None:
    """After a cut nothing can reach back, so all before it is final."""
    windows = StaticWindows()
    still, cut = np.ones(3, bool), np.zeros(3, bool)
    assert [windows.push(row) for row in (None, still, still, cut)] == [
        [],
        [],
        [],
        [Segment(0, 3)],
    ]


@pytest.mark.parametrize(("lag", "rate"), [(8, 0.5), (8, 0.9), (8, 1.0), (None, 0.5), (None, 1.0)])
def test_state_and_work_stay_bounded_in_a_long_stream(lag: int | None, rate: float) -> None:
    rng = np.random.default_rng(0)
    windows = StaticWindows(max_frames=32, lag=lag)
    windows.push(None)
    size, peak, committed = {}, {}, 0
    for frame in range(1, 4001):
        links = rng.random(6) < rate
        watched = frame in (1000, 4000)
        if watched:
            tracemalloc.start()
        committed += sum(map(len, windows.push(links)))
        if watched:
            peak[frame] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            size[frame] = len(pickle.dumps(windows))
    assert 4001 - committed < 32 + (lag or 200)
    assert size[4000] < 2 * size[1000]
    assert size[4000] < 4096
    assert peak[4000] < 2 * peak[1000] + 4096


def test_misuse_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_frames is 0; it must be at least 1"):
        StaticWindows(max_frames=0)
    with pytest.raises(ConfigError, match="lag is -1; it must be 0 or more, or None"):
        StaticWindows(lag=-1)
    with pytest.raises(ValueShapeError, match="links is None for the first frame"):
        StaticWindows().push(np.ones(3, bool))
    windows = StaticWindows()
    windows.push(None)
    with pytest.raises(ValueShapeError, match="this is frame 1"):
        windows.push(None)
