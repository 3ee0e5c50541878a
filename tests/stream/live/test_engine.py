"""The state machine of a stream, frame by frame."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.data import Budget, PatchGrid
from stream.errors import ConfigError
from stream.live.engine import StreamEngine
from stream.live.values import Part, StreamConfig, joined
from stream.memory import Memory
from stream.pipeline import EncodedVideo, reduce_video
from stream.reducers.holitom import HoliTom
from stream.registry import build_reducer
from stream.signals import Signal
from stream.sources.live_values import Gap

from .fakes import arrived, encoded, picture

OUTER = HoliTom(inner=None, max_segment_frames=4)


def random_video(seed: int, frames: int, patches: int = 6) -> EncodedVideo:
    """Patches that mostly stay as they are, some of which change from frame to frame."""
    random = np.random.default_rng(seed)
    x = np.repeat(random.normal(size=(1, patches, 5)), frames, 0)
    for t in range(1, frames):
        x[t] = np.where(
            random.random((patches, 1)) < 0.3, random.normal(size=(patches, 5)), x[t - 1]
        )
    flat = torch.from_numpy(x.reshape(-1, 5)).float()
    saliency = torch.from_numpy(random.random(frames * patches)).float()
    times = tuple(t / 2 for t in range(frames))
    return EncodedVideo(flat, {Signal.SALIENCY: saliency}, PatchGrid(frames, 2, 3), times)


def run(video: EncodedVideo, **settings: object) -> tuple[StreamEngine, list[Part]]:
    engine = StreamEngine("x", StreamConfig.model_validate({"fps": 2.0, **settings}), OUTER)
    parts = [p for frame in video.by_frame() for p in engine.accept(frame)]
    return engine, parts + engine.flush()


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6), frames=st.integers(1, 14), rate=st.floats(1, 10), more=st.booleans()
)
def test_unlimited_lag_gives_the_offline_plan(
    seed: int, frames: int, rate: float, more: bool
) -> None:
    video = random_video(seed, frames)
    lag = frames if more else None
    _, parts = run(video, lag_frames=lag, tokens_per_s=rate, burst_s=100.0)
    budget = Budget(max(1, int(rate * frames / 2 + 1e-6)))
    offline = reduce_video(video, OUTER, budget, Memory())
    assert len(parts) == 1
    assert parts[0].video.plan.same_as(offline.plan)
    assert parts[0].video.segments == offline.segments
    assert torch.equal(parts[0].video.x, offline.x)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), frames=st.integers(1, 20), lag=st.integers(0, 8))
def test_parts_cover_every_frame_once_within_the_budget(seed: int, frames: int, lag: int) -> None:
    video = random_video(seed, frames)
    engine, parts = run(video, lag_frames=lag, tokens_per_s=6.0)
    whole = joined([p.video for p in parts])
    assert whole.pts_s == video.pts_s
    assert whole.plan.n == video.grid.size
    assert bool((whole.plan.anchor.diff() > 0).all())
    assert whole.plan.k <= 3 * frames + len(parts)
    assert engine.counts.tokens_out == whole.plan.k == whole.x.shape[0]
    assert torch.allclose(whole.plan.apply(video.x), whole.x, atol=1e-6)


def test_no_frame_waits_longer_than_the_lag_and_a_segment() -> None:
    video = random_video(3, 40)
    engine = StreamEngine("x", StreamConfig(fps=2.0, lag_frames=5), OUTER)
    done = 0
    for t, frame in enumerate(video.by_frame()):
        done += sum(p.frames for p in engine.accept(frame))
        assert t + 1 - done <= 5 + OUTER.max_segment_frames


def test_what_waits_keeps_what_was_earned_while_it_came() -> None:
    video = random_video(7, 24)
    _, parts = run(video, lag_frames=6, tokens_per_s=6.0)
    done_s = 0.0
    for part in parts[:-1]:
        done_s += part.frames / 2
        spent = sum(p.video.plan.k for p in parts[: parts.index(part) + 1])
        assert spent <= 6.0 * done_s + 1e-6


def test_tail_shows_what_waits_and_changes_nothing() -> None:
    video = random_video(5, 9)
    watched = StreamEngine("x", StreamConfig(fps=2.0, lag_frames=None), OUTER)
    for frame in video.by_frame():
        watched.accept(frame)
        tail = watched.tail()
        assert tail is not None
        assert tail.pts_s[-1] == frame.pts_s[0]
    _, parts = run(video, lag_frames=None)
    assert watched.flush()[0].video.plan.same_as(parts[0].video.plan)
    assert watched.tail() is None


def test_a_gap_closes_what_waits() -> None:
    video = random_video(1, 6)
    engine = StreamEngine("x", StreamConfig(fps=2.0, lag_frames=None), OUTER)
    frames = video.by_frame()
    for frame in frames[:4]:
        assert engine.accept(frame) == []
    closed = engine.accept(frames[4], Gap(("reconnect",), 3.0))
    assert [p.video.pts_s for p in closed] == [video.pts_s[:4]]
    assert [e.said for e in engine.events if e.kind == "gap"] == [
        {"causes": ["reconnect"], "missing_s": 3.0}
    ]


def test_anchor_mode_emits_a_first_frame_and_then_what_is_new() -> None:
    config = StreamConfig(mode="anchor", fps=2.0, tokens_per_s=8.0, burst_s=4.0, tau=0.9)
    engine = StreamEngine("x", config, build_reducer("saliency"))
    frames = [encoded([picture(100, 5, 90 if t >= 2 else 0)], [t / 2]) for t in range(4)]
    parts = [p for f in frames for p in engine.accept(f)]
    assert [p.video.plan.k for p in parts] == [4, 0, 1, 0]
    assert parts[2].video.plan.anchor.tolist() == [5]
    assert [p.group for p in parts] == [0, 0, 0, 0]
    cut = engine.accept(encoded([picture(250)], [2.0]))
    assert cut[0].group == 1
    assert cut[0].video.plan.k > 1


def test_what_changed_but_did_not_fit_stays_new() -> None:
    config = StreamConfig(mode="anchor", fps=2.0, tokens_per_s=2.0, burst_s=1.0, tau=0.9)
    engine = StreamEngine("x", config, build_reducer("saliency"))
    still = picture(100)
    changed = picture(100, 5, 90)
    changed[:8, :8] = 190
    images = [still, changed, changed, changed]
    parts = [p for t, i in enumerate(images) for p in engine.accept(encoded([i], [t / 2]))]
    assert [p.video.plan.k for p in parts] == [1, 1, 1, 0]
    assert {int(a) for p in parts[1:] for a in p.video.plan.anchor} == {0, 5}


def test_still_pictures_are_gated_and_tokens_saved() -> None:
    engine = StreamEngine("x", StreamConfig(fps=2.0, gate_silence_s=3.0), OUTER)
    wanted = [engine.offer(arrived(picture(100), t / 2)) for t in range(14)]
    assert [t for t, w in enumerate(wanted) if w] == [0, 6, 12]
    assert engine.counts.gated == 11
    assert engine.novelty < 0.5


def test_a_gap_is_carried_by_the_next_frame_that_is_encoded() -> None:
    engine = StreamEngine("x", StreamConfig(fps=2.0), OUTER)
    assert engine.offer(arrived(picture(100), 0.0)) is not None
    assert engine.offer(arrived(picture(100), 0.1)) is None
    back = engine.offer(arrived(picture(100), 0.2, Gap(("reconnect",), 1.0)))
    assert back is not None
    assert back.gap == Gap(("reconnect",), 1.0)


def test_reducers_that_need_the_question_are_refused() -> None:
    with pytest.raises(ConfigError, match="InnerMerge acts inside the language model"):
        StreamEngine("x", StreamConfig(), HoliTom())
    with pytest.raises(ConfigError, match="tau_quantile needs the whole video"):
        StreamEngine("x", StreamConfig(), HoliTom(inner=None, tau_quantile=0.5))
