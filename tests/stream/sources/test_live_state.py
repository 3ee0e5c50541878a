"""The decisions of a live source, with made-up times: no clock, no thread, no sleep."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.sources.live_state import (
    Backoff,
    Connected,
    Ended,
    Event,
    FrameQueue,
    Health,
    Heard,
    Limits,
    Lost,
    MediaClock,
    Seen,
    StillPicture,
    Tick,
    step,
)
from stream.sources.live_values import Gap, Phase, Policy

LIMITS = Limits(silent_s=5.0, frozen_s=10.0)
JUMP = Gap(("jump",), 2.0)
RECONNECT = Gap(("reconnect",), 3.0)


@given(
    policy=st.sampled_from(["latest", "drop-oldest", "block"]),
    frames=st.integers(1, 5),
    actions=st.lists(st.sampled_from(["push", "push with gap", "pop"]), max_size=60),
)
def test_nothing_is_lost_without_a_count_and_no_gap_is_forgotten(
    policy: Policy, frames: int, actions: list[str]
) -> None:
    queue = FrameQueue[int](policy, frames)
    capacity = 1 if policy == "latest" else frames
    pushed = 0
    gaps_in_s = gaps_out_s = 0.0
    held: deque[int] = deque()
    previous = -1
    for action in actions:
        if action == "pop":
            queued = queue.pop()
            assert (queued is None) == (not held)
            if queued is not None:
                assert queued.item == held.popleft()
                assert queued.dropped == queued.item - previous - 1
                previous = queued.item
                gaps_out_s += queued.gap.missing_s if queued.gap else 0.0
        elif queue.has_room:
            gap = JUMP if action == "push with gap" else None
            queue.push(pushed, gap)
            gaps_in_s += gap.missing_s if gap else 0.0
            held.append(pushed)
            pushed += 1
            if len(held) > capacity:
                held.popleft()
        assert len(queue) == len(held) <= capacity
    while (queued := queue.pop()) is not None:
        gaps_out_s += queued.gap.missing_s if queued.gap else 0.0
        previous = queued.item
    assert gaps_out_s == gaps_in_s
    assert previous == pushed - 1
    if policy == "block":
        assert queue.dropped == 0


def test_latest_gives_the_newest() -> None:
    queue = FrameQueue[str]("latest", 8)
    queue.push("a", RECONNECT)
    queue.push("b")
    queue.push("c", JUMP)
    queued = queue.pop()
    assert queued is not None
    assert (queued.item, queued.dropped) == ("c", 2)
    assert queued.gap == Gap(("reconnect", "jump"), 5.0)
    assert queue.pop() is None


def test_block_has_no_room_when_full() -> None:
    queue = FrameQueue[int]("block", 2)
    queue.push(0)
    assert queue.has_room
    queue.push(1)
    assert not queue.has_room
    queue.pop()
    assert queue.has_room


@given(
    first_s=st.floats(0.01, 5),
    factor=st.floats(1, 100),
    seed=st.integers(),
    attempts=st.integers(1, 200),
)
def test_backoff_doubles_up_to_its_cap_within_its_jitter(
    first_s: float, factor: float, seed: int, attempts: int
) -> None:
    cap_s = first_s * factor
    backoff, twin = Backoff(first_s, cap_s, seed), Backoff(first_s, cap_s, seed)
    for attempt in range(attempts):
        wait_s = backoff.next_s()
        full_s = min(cap_s, first_s * 2.0 ** min(attempt, 64))
        assert full_s / 2 <= wait_s <= full_s
        assert wait_s == twin.next_s()
    backoff.reset()
    assert backoff.next_s() <= first_s


def test_unseeded_backoffs_differ() -> None:
    assert len({Backoff(1.0, 30.0).next_s() for _ in range(20)}) > 1


@given(
    events=st.lists(
        st.tuples(
            st.one_of(st.none(), st.floats(-1e6, 1e6)),
            st.floats(0, 100),
            st.booleans(),
            st.sampled_from(["a", "b"]),
        ),
        max_size=50,
    ),
    arrives_live=st.booleans(),
)
def test_media_time_ascends_whatever_is_stated(
    events: list[tuple[float | None, float, bool, str]], arrives_live: bool
) -> None:
    clock = MediaClock(jump_s=1.0)
    clock.connect(arrives_live=arrives_live)
    arrival_s, before_s, form_before = 0.0, -math.inf, None
    for number, (stated_s, passed_s, reconnected, form) in enumerate(events):
        if reconnected:
            clock.connect(arrives_live=arrives_live)
        arrival_s += passed_s
        pts_s, gap = clock.place(stated_s, arrival_s, form)
        assert pts_s > before_s
        causes = gap.causes if gap else ()
        assert ("reconnect" in causes) == (reconnected and number > 0)
        assert ("change" in causes) == (number > 0 and form != form_before)
        assert gap is None or gap.missing_s >= 0
        before_s, form_before = pts_s, form


def steady(clock: MediaClock, count: int, first_s: float = 0.0) -> float:
    """`count` pictures at 10 a second; the last media time."""
    pts_s = math.nan
    for number in range(count):
        pts_s, gap = clock.place(first_s + number / 10, 100 + number / 10)
        assert gap is None
    return pts_s


def test_a_steady_stream_keeps_its_stated_times() -> None:
    clock = MediaClock(1.0)
    clock.connect(arrives_live=True)
    assert steady(clock, 11, first_s=7.0) == pytest.approx(8.0)


def test_a_reconnect_goes_on_by_the_time_that_passed() -> None:
    clock = MediaClock(1.0)
    clock.connect(arrives_live=True)
    steady(clock, 11)
    clock.connect(arrives_live=True)
    pts_s, gap = clock.place(0.0, 101 + 30)
    assert (pts_s, gap) == (pytest.approx(31.0), Gap(("reconnect",), pytest.approx(30.0)))
    assert clock.place(0.1, 101 + 30.1) == (pytest.approx(31.1), None)


@pytest.mark.parametrize(("arrives_live", "expected_s"), [(True, 1.2), (False, 1001.0)])
def test_a_leap_ahead_is_a_jump(arrives_live: bool, expected_s: float) -> None:
    clock = MediaClock(1.0)
    clock.connect(arrives_live=arrives_live)
    steady(clock, 11)
    pts_s, gap = clock.place(1001.0, 101.2)
    assert gap is not None
    assert gap.causes == ("jump",)
    assert pts_s == pytest.approx(expected_s)


def test_a_step_back_is_a_jump() -> None:
    clock = MediaClock(1.0)
    clock.connect(arrives_live=True)
    steady(clock, 11)
    pts_s, gap = clock.place(0.3, 101.1)
    assert (pts_s, gap) == (pytest.approx(1.1), Gap(("jump",), pytest.approx(0.1)))


def test_a_slow_but_regular_camera_has_no_jumps() -> None:
    clock = MediaClock(1.0)
    clock.connect(arrives_live=True)
    assert all(clock.place(10.0 * n, 10.0 * n)[1] is None for n in range(20))


def test_equal_times_are_jitter_and_missing_times_go_on_at_the_usual_step() -> None:
    clock = MediaClock(1.0)
    clock.connect(arrives_live=True)
    steady(clock, 11)
    pts_s, gap = clock.place(1.0, 101.1)
    assert gap is None
    assert pts_s > 1.0
    assert clock.place(None, 101.2)[0] == pytest.approx(pts_s + 0.1)


def test_a_still_picture_is_told_from_a_slow_change() -> None:
    still = StillPicture()
    picture = np.full((64, 64), 100, np.uint8)
    assert not still.same(picture)
    assert still.same(picture)
    assert still.same(picture + 5)
    changes = [not still.same(picture + np.uint8(level)) for level in range(30)]
    assert any(changes)
    moved = picture.copy()
    moved[10:13, 10:13] = 200
    still = StillPicture()
    still.same(picture)
    assert not still.same(moved)
    assert not still.same(moved[:32])


@pytest.mark.parametrize(
    ("events", "phases"),
    [
        ([Connected(0), Heard(0.5), Seen(0.5, False)], ["connecting", "connecting", "live"]),
        (
            [Seen(0, False), Seen(5, True), Seen(10, True), Seen(11, True), Seen(12, False)],
            ["live", "live", "frozen", "frozen", "live"],
        ),
        (
            [Seen(0, False), Tick(4.9), Tick(5.1), Heard(6), Seen(6, False)],
            ["live", "live", "silent", "connecting", "live"],
        ),
        (
            [Seen(0, False), Seen(12, True), Tick(16), Tick(17.5), Lost(18, "gone"), Tick(99)],
            ["live", "frozen", "frozen", "silent", "lost", "lost"],
        ),
        (
            [Lost(1, "refused"), Connected(2), Tick(6.9), Tick(7.1)],
            ["lost", "connecting", "connecting", "silent"],
        ),
        (
            [Seen(0, False), Ended(1, "over"), Heard(2), Tick(9)],
            ["live", "ended", "ended", "ended"],
        ),
    ],
)
def test_phases(events: list[Event], phases: list[Phase]) -> None:
    health, seen = Health(), []
    for event in events:
        health = step(health, event, LIMITS)
        seen.append(health.phase)
    assert seen == phases


def test_frozen_and_silent_say_for_how_long() -> None:
    health = step(step(Health(), Seen(0, False), LIMITS), Seen(10.5, True), LIMITS)
    assert health.said == "the same picture for 10.5 s"
    assert "no packet for 7.0 s" in step(health, Tick(17.5), LIMITS).said


@given(
    kinds=st.lists(
        st.tuples(
            st.sampled_from(["connected", "heard", "same", "new", "lost", "tick", "ended"]),
            st.floats(0, 20),
        ),
        max_size=60,
    )
)
def test_a_source_is_frozen_only_when_pictures_come_and_silent_only_when_none_do(
    kinds: list[tuple[str, float]],
) -> None:
    health, at_s = Health(), 0.0
    for kind, passed_s in kinds:
        at_s += passed_s
        event: Event = {
            "connected": Connected(at_s),
            "heard": Heard(at_s),
            "same": Seen(at_s, True),
            "new": Seen(at_s, False),
            "lost": Lost(at_s, "x"),
            "tick": Tick(at_s),
            "ended": Ended(at_s, "x"),
        }[kind]
        before, health = health, step(health, event, LIMITS)
        if health.phase == "frozen" != before.phase:
            assert kind == "same"
        if health.phase == "silent" != before.phase:
            assert kind == "tick"
        if before.phase == "ended":
            assert health == before
        assert health.phase != "lost" or health.heard_s is None
