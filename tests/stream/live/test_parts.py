"""The gate, the bucket, the window and the archive, each by itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stream.data import Budget, PatchGrid
from stream.errors import BudgetError
from stream.live.budget_bucket import TokenBucket, shares
from stream.live.gate import FrameClock, PixelGate, block_means
from stream.live.store import Archive, Window, most_relevant, relevances
from stream.live.values import Part, joined
from stream.pipeline import ReducedVideo
from stream.plan import Plan

from .fakes import picture


def video(time_s: float, feature: list[float] | None = None, frames: int = 2) -> ReducedVideo:
    x = torch.tensor([feature or [1.0, 0.0]]).repeat(frames, 1)
    grid = PatchGrid(frames, 2, 2)
    plan = Plan.keep(torch.arange(frames) * 4, grid.size)
    times = tuple(time_s + t for t in range(frames))
    return ReducedVideo(x, plan, grid, times, Budget(frames))


def test_one_small_thing_passes_the_gate_and_noise_does_not() -> None:
    gate = PixelGate(level=6.0, silence_s=10.0)
    noise = np.random.default_rng(0)
    base = np.full((480, 640, 3), 120, np.int16)
    for t in range(5):
        image = (base + noise.integers(-4, 5, base.shape)).astype(np.uint8)
        assert gate.passes(image, t / 10) == (t == 0)
    image = base.astype(np.uint8)
    image[200:230, 300:330] = 200
    assert gate.passes(image, 0.6)


def test_slow_drift_passes_before_the_silence_ends() -> None:
    gate = PixelGate(level=6.0, silence_s=100.0)
    passed = [t for t in range(30) if gate.passes(picture(100 + t), float(t))]
    assert passed == [0, 6, 12, 18, 24]


@pytest.mark.parametrize("shape", [(1, 1), (31, 500), (224, 224), (1080, 1920)])
def test_block_means_are_means(shape: tuple[int, int]) -> None:
    means = block_means(np.full((*shape, 3), 77, np.uint8))
    assert means.shape[0] <= 32
    assert means.shape[1] <= 32
    assert np.allclose(means, 77)


def test_frame_clock_takes_the_first_frame_at_each_wanted_time() -> None:
    clock = FrameClock(2.0)
    assert [t for t in range(24) if clock.wants(5 + t / 12)] == [0, 6, 12, 18]
    assert clock.wants(60.0)
    assert not clock.wants(60.1)


def test_bucket_saves_up_to_its_burst_and_pays_back() -> None:
    bucket = TokenBucket(10.0, 2.5)
    bucket.earn(1.0)
    assert bucket.tokens == bucket.offer(1.0) == 10
    bucket.spend(13, 1.0)
    bucket.earn(0.5)
    assert bucket.tokens == 2
    bucket.earn(100.0)
    assert bucket.tokens == 25
    with pytest.raises(BudgetError, match="both must be above 0"):
        TokenBucket(0.0, 1.0)


def test_a_part_with_little_new_leaves_tokens_for_a_busy_one() -> None:
    bucket = TokenBucket(10.0, 40.0)
    offers = []
    for news in (4.0, 1.0, 1.0, 10.0):
        bucket.earn(10.0)
        offers.append(bucket.offer(news))
        bucket.spend(offers[-1], news)
    assert offers == [100, 40, 50, 210]
    assert bucket.offer(1e6) == 1


@given(
    st.dictionaries(st.text(), st.floats(0, 1e3), min_size=1, max_size=6),
    st.floats(0.01, 1),
)
def test_shares_add_up_and_keep_the_floor(novelty: dict[str, float], floor: float) -> None:
    rates = shares(100.0, novelty, floor)
    assert sum(rates.values()) == pytest.approx(100.0)
    assert min(rates.values()) >= 100.0 * floor / len(novelty) * (1 - 1e-9)


def test_busy_streams_get_more() -> None:
    rates = shares(100.0, {"a": 0.9, "b": 0.0, "c": 0.1, "d": 0.0}, floor=0.2)
    assert rates == pytest.approx({"a": 77.0, "b": 5.0, "c": 13.0, "d": 5.0})
    assert shares(8.0, {"a": 0.0, "b": 0.0}) == {"a": 4.0, "b": 4.0}
    with pytest.raises(BudgetError, match="floor"):
        shares(8.0, {"a": 1.0}, floor=0.0)


def test_window_lets_whole_groups_leave_oldest_first() -> None:
    window = Window(frames=6)
    for group, time_s in ((0, 0.0), (0, 2.0), (1, 4.0)):
        assert window.admit([Part(group, video(time_s))]) == []
    left = window.admit([Part(2, video(6.0))])
    assert [p.video.pts_s[0] for p in left] == [0.0, 2.0]
    assert [p.group for p in window.parts] == [1, 2]
    assert [p.group for p in window.admit([], waiting=3)] == [1]
    assert window.admit([], waiting=50) == []


def test_window_lets_the_least_relevant_leave_once_it_was_asked() -> None:
    window = Window(frames=6, evict="least_relevant")
    for group, feature in enumerate(([1.0, 0.0], [0.0, 1.0], [0.9, 0.1])):
        window.admit([Part(group, video(2.0 * group, feature))])
    window.asked(torch.tensor([[1.0, 0.0]]))
    assert [p.group for p in window.admit([Part(3, video(6.0))])] == [1]


@pytest.mark.parametrize("on_disk", [False, True])
def test_archive_gives_back_what_the_model_needs(tmp_path: Path, on_disk: bool) -> None:
    folder = tmp_path / "archive" if on_disk else None
    archive = Archive(1.0, folder)
    for group in range(3):
        assert archive.put(group, video(10.0 * group, [0.5, group])) == []
    back, sent = archive.get(1), video(10.0, [0.5, 1])
    assert torch.equal(back.x, sent.x)
    assert back.plan.same_as(sent.plan)
    assert (back.grid, back.pts_s) == (sent.grid, sent.pts_s)
    assert archive.between(10.5, 20.0) == [1, 2]
    assert archive.between(2.0, 9.0) == []


@pytest.mark.parametrize("on_disk", [False, True])
def test_archive_forgets_the_oldest_beyond_its_limit(tmp_path: Path, on_disk: bool) -> None:
    one_mib = video(0.0).x.nbytes + 16
    archive = Archive(2.5 * one_mib / 2**20, tmp_path if on_disk else None)
    forgotten = [archive.put(group, video(float(group))) for group in range(4)]
    assert forgotten == [[], [], [0], [1]]
    assert archive.groups() == [2, 3]
    assert len(list(tmp_path.iterdir())) == (2 if on_disk else 0)


def test_relevance_counts_the_words_that_tell_pieces_apart() -> None:
    empty = ReducedVideo(
        torch.zeros(0, 2), Plan.keep(torch.arange(0), 4), PatchGrid(1, 2, 2), (0.0,), Budget(0)
    )
    held = [video(0.0, [2.0, 0.0]), video(2.0, [0.0, 1.0]), video(4.0, [1.0, 1.0]), empty]
    words = torch.tensor([[1.0, 0.0]])
    assert relevances(held, words) == pytest.approx([1.0, 0.0, 0.5**0.5, -1.0], abs=1e-5)
    filler = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    same = [video(0.0, [1.0, 0.0]), video(2.0, [0.0, 1.0])]
    assert relevances(same, filler) == pytest.approx([1.0, 0.0], abs=1e-5)
    assert most_relevant(held, words, frames=4) == [0, 2]
    assert most_relevant(held, words, frames=3) == [0, 3]


def test_joined_plans_act_on_joined_inputs() -> None:
    merge = Plan.merge(
        torch.tensor([0]), torch.tensor([0, 0]), torch.tensor([0, 2]), torch.tensor([0.5, 0.5]), 4
    )
    plans = [Plan.keep(torch.tensor([1, 3]), 4), merge]
    x = torch.randn(8, 3)
    whole = Plan.joined(plans)
    parts = torch.cat([plans[0].apply(x[:4]), plans[1].apply(x[4:])])
    assert torch.allclose(whole.apply(x), parts)
    assert whole.anchor.tolist() == [1, 3, 4]
    assert joined([video(0.0), video(2.0)]).pts_s == (0.0, 1.0, 2.0, 3.0)
