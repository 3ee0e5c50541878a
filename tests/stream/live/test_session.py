"""Streams behind one model: batching, the window, the archive, answers and their evidence."""

from __future__ import annotations

from pathlib import Path

import pytest

from stream.errors import ConfigError, SourceError, UnknownNameError
from stream.live.session import Session
from stream.live.spans import span_in
from stream.live.values import StreamConfig
from stream.reducers.holitom import HoliTom
from stream.sources.live_values import Gap, LiveFrame

from .fakes import FakeModel, arrived, picture

CONFIG = StreamConfig(
    fps=None, lag_frames=0, tokens_per_s=16.0, window_frames=4, gate_level=0.0, gate_silence_s=1.0
)


def session(model: FakeModel | None = None, **options: float) -> Session:
    return Session(model or FakeModel(), HoliTom(inner=None), **options)


def feed(live: Session, name: str, levels: list[int], start_s: float = 0.0) -> list[str]:
    kinds = []
    for t, level in enumerate(levels):
        got = arrived(picture(level), start_s + t)
        kinds += [e.kind for e in live.step({name: [got]})]
    return kinds


def test_frames_of_all_streams_go_through_the_encoder_together() -> None:
    model = FakeModel()
    live = session(model)
    for name in "ab":
        live.attach(name, CONFIG)
    live.step({name: [arrived(picture(50), 0.0), arrived(picture(90), 1.0)] for name in "ab"})
    assert model.batches == [4]
    assert live.counts("a").encoded == live.counts("b").encoded == 2
    assert live.newest_s("a") == (1.0, 1.1)


def test_two_streams_do_not_touch_each_other() -> None:
    alone, together = session(), session()
    alone.attach("a", CONFIG)
    for name in "ab":
        together.attach(name, CONFIG)
    for t in range(6):
        a, b = arrived(picture(40 * t), t), arrived(picture(200 - 20 * t), t)
        alone.step({"a": [a]})
        together.step({"b": [b], "a": [a]})
    for one, two in zip(alone.window("a"), together.window("a"), strict=True):
        assert one.video.plan.same_as(two.video.plan)


def test_the_past_is_gone_from_the_window_and_comes_back_from_the_archive(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        live = session()
        live.attach("a", CONFIG, folder)
        kinds = feed(live, "a", [10, 70, 130, 190, 250, 20, 80, 140])
        assert kinds.count("part") == 8
        assert kinds.count("evicted") == 4
        now = live.ask("a", ["#140"])
        assert now.reply.answers[0].text == "4 frames from 4 to 7"
        assert now.spans_s == ((4.0, 4.0), (5.0, 5.0), (6.0, 6.0), (7.0, 7.0))
        assert now.newest_pts_s == 7.0
        assert now.age_s(9.1) == pytest.approx(2.0)
        past = live.ask("a", ["#70"], span_s=(1.0, 2.0))
        assert past.reply.answers[0].text == "2 frames from 1 to 2"
        assert past.recalled == 2
        assert past.age_s(9.1) == pytest.approx(7.0)
        named = live.ask("a", ["#what was there from 0:01 to 0:02?"])
        assert named.spans_s == past.spans_s
        found = live.ask("a", ["#10"], recall=True)
        assert found.spans_s[0] == (0.0, 0.0)
        assert len(found.spans_s) == 4


def test_a_question_about_what_was_never_held_says_what_is() -> None:
    live = session()
    live.attach("a", CONFIG)
    with pytest.raises(SourceError, match="has given no frame yet"):
        live.ask("a", ["#1"])
    feed(live, "a", [10, 70])
    with pytest.raises(SourceError, match=r"Nothing of \(50, 60\) s .* holds 0.0 to 1.0 s"):
        live.ask("a", ["#1"], span_s=(50, 60))


def test_what_waits_is_part_of_an_answer() -> None:
    live = session()
    live.attach("a", CONFIG.model_copy(update={"lag_frames": None}))
    feed(live, "a", [10, 70, 130])
    assert live.window("a") == ()
    assert live.ask("a", ["#10"]).reply.answers[0].text == "3 frames from 0 to 2"
    assert [e.kind for e in live.flush("a")] == ["part"]
    assert live.ask("a", ["#10"]).spans_s == ((0.0, 2.0),)


def test_models_that_take_frames_in_pairs_get_pairs() -> None:
    model = FakeModel(frames_per_token=2)
    live = session(model)
    live.attach("a", CONFIG)
    feed(live, "a", [10, 70, 130])
    assert model.batches[-1] == 2
    assert live.counts("a").encoded == 1
    back: LiveFrame = arrived(picture(200), 9.0, Gap(("reconnect",), 6.0))
    live.step({"a": [back]})
    assert live.counts("a").encoded == 2
    live.flush("a")
    assert live.counts("a").encoded == 3
    assert [p.video.pts_s for p in live.window("a")] == [(0.0,), (2.0,), (9.0,)]


def test_a_shared_budget_follows_what_is_new() -> None:
    live = session(shared_tokens_per_s=40.0, floor=0.5)
    for name in ("busy", "still"):
        live.attach(name, CONFIG.model_copy(update={"lag_frames": 4}))
    for t in range(30):
        moving = arrived(picture(20 + 200 * (t % 2)), t)
        live.step({"busy": [moving], "still": [arrived(picture(100), t)]})
    rates = live.tokens_per_s()
    assert sum(rates.values()) == pytest.approx(40.0)
    assert rates["busy"] > 25
    assert rates["still"] >= 10.0


def test_names_are_checked() -> None:
    live = session()
    live.attach("door", CONFIG)
    with pytest.raises(ConfigError, match="attached already"):
        live.attach("door")
    with pytest.raises(UnknownNameError, match="Did you mean 'door'"):
        live.ask("dor", ["#1"])
    live.detach("door")
    assert live.names == ()


@pytest.mark.parametrize(
    ("question", "span_s"),
    [
        ("what moved between 60 and 90 s?", (60.0, 90.0)),
        ("what moved from 1:00 to 1:30?", (60.0, 90.0)),
        ("From 1 to 2.5 minutes, who came?", (60.0, 150.0)),
        ("from 90 sec until 2 min?", (90.0, 120.0)),
        ("from 1:00:00 to 1:00:05.5?", (3600.0, 3605.5)),
        ("between 2 and 3 stars?", None),
        ("did it go from left to right?", None),
        ("between 90 and 60 s?", None),
        ("what color?", None),
    ],
)
def test_a_question_may_name_a_span(question: str, span_s: tuple[float, float] | None) -> None:
    assert span_in(question) == span_s
