"""Which frames are wanted: properties of the rules, on any presentation times."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.errors import ConfigError
from stream.sources.sampling import Fps, FpsClock, Reservoir, Times, Uniform


@st.composite
def presentation_times(draw: st.DrawFn) -> Times:
    """Ascending times on a 1/12800 s grid, gaps from one tick to many seconds."""
    gaps = draw(st.lists(st.sampled_from([1, 40, 512, 533, 12800, 99999]), max_size=60))
    start = draw(st.integers(-20000, 10**6))
    return np.cumsum([start, *gaps]) / 12800


@given(presentation_times(), st.integers(1, 80))
def test_uniform_gives_the_exact_count_of_distinct_frames(pts_s: Times, frames: int) -> None:
    picked = Uniform(frames).pick(pts_s)
    assert len(picked) == min(frames, len(pts_s))
    assert (np.diff(picked) > 0).all()
    assert picked[0] == 0
    if frames > 1:
        assert picked[-1] == len(pts_s) - 1


@given(st.integers(1, 400), st.integers(2, 64), st.sampled_from([24, 25, 30, 30000 / 1001]))
def test_uniform_at_a_constant_rate_is_linspace_over_indices(
    have: int, frames: int, rate: float
) -> None:
    picked = Uniform(frames).pick(np.arange(have) / rate)
    places = np.linspace(0, have - 1, min(frames, have))
    assert picked.tolist() == np.floor(places + 1e-4).astype(int).tolist()


def test_uniform_follows_time_not_frame_count() -> None:
    burst_then_still = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 5.0, 10.0])
    assert Uniform(3).pick(burst_then_still).tolist() == [0, 5, 6]


def test_uniform_shows_the_frame_on_screen_and_never_repeats_it() -> None:
    # At 3.33 s and 6.67 s frame 1 is still shown; the second of the two takes frame 2.
    assert Uniform(4).pick(np.array([0.0, 1.0, 9.0, 9.5, 10.0])).tolist() == [0, 1, 2, 4]


@given(presentation_times(), st.sampled_from([0.25, 1.0, 2.0, 7.5, 30.0]))
def test_fps_gives_the_frames_shown_at_the_wanted_times(pts_s: Times, fps: float) -> None:
    end_s = 2 * pts_s[-1] - pts_s[-2] if len(pts_s) > 1 else pts_s[0] + 1e-3
    wanted = pts_s[0] + np.arange(int(np.ceil((end_s - pts_s[0] - 1e-6) * fps))) / fps
    shown = np.searchsorted(pts_s, wanted + 1e-6, side="right") - 1
    assert Fps(fps).pick(pts_s).tolist() == sorted(set(shown.tolist()))


@given(presentation_times())
def test_fps_above_the_rate_gives_every_frame(pts_s: Times) -> None:
    assert Fps(1e6).pick(pts_s).tolist() == list(range(len(pts_s)))


@given(presentation_times(), st.sampled_from([0.5, 2.0, 24.0]), st.integers(1, 20))
def test_fps_with_a_limit_reaches_the_end(pts_s: Times, fps: float, limit: int) -> None:
    free, limited = Fps(fps).pick(pts_s), Fps(fps, max_frames=limit).pick(pts_s)
    assert len(limited) == min(limit, len(free))
    assert set(limited) <= set(free)
    if limit > 1:
        assert limited[-1] == free[-1]


@given(presentation_times(), st.sampled_from([0.25, 1.0, 7.5, 30.0, 1e4]))
def test_the_clock_picks_what_fps_picks(pts_s: Times, fps: float) -> None:
    clock = FpsClock[int](fps)
    given_out = [clock.push(index, time_s) for index, time_s in enumerate(pts_s.tolist())]
    given_out.append(clock.end())
    assert [index for index in given_out if index is not None] == Fps(fps).pick(pts_s).tolist()


@given(presentation_times(), st.integers(1, 30))
def test_the_reservoir_is_bounded_exact_in_count_and_covers_the_end(
    pts_s: Times, frames: int
) -> None:
    store = Reservoir[int](frames)
    for index, time_s in enumerate(pts_s.tolist()):
        store.push(index, time_s)
        assert len(store) <= 2 * frames
    kept = store.end()
    assert len(kept) == min(frames, len(pts_s))
    assert kept == sorted(set(kept))
    assert kept[0] == 0
    if frames > 1:
        assert kept[-1] == len(pts_s) - 1


@given(st.integers(1, 3000), st.integers(2, 32))
def test_the_reservoir_stays_evenly_spaced(have: int, frames: int) -> None:
    store = Reservoir[int](frames)
    for index in range(have):
        store.push(index, index / 24)
    if have > 2 * frames:
        even = np.linspace(0, have - 1, frames)
        stride = (have - 1) / (frames - 1)
        assert np.abs(np.array(store.end()) - even).max() <= stride + 1


def test_nothing_is_picked_from_nothing() -> None:
    nothing = np.empty(0)
    assert len(Uniform(4).pick(nothing)) == len(Fps(1).pick(nothing)) == 0
    assert Reservoir[int](3).end() == []
    assert FpsClock[int](1).end() is None


@pytest.mark.parametrize("frames", [0, -3, 1.5, True])
def test_a_count_is_a_whole_number_above_0(frames: int) -> None:
    with pytest.raises(ConfigError, match="whole number, at least 1"):
        Uniform(frames)
    with pytest.raises(ConfigError, match="max_frames is"):
        Fps(1, max_frames=frames)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_a_rate_is_finite_and_above_0(fps: float) -> None:
    with pytest.raises(ConfigError, match="finite number above 0"):
        Fps(fps)
