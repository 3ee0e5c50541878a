"""The measures of `bench stream`, on a model whose answers can be foreseen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from foveate import live_bench
from foveate.live_load import fairness, hour_verdict, long_run
from policies.video.tiny.questions import Question
from stream.reducers.holitom import HoliTom
from tests.stream.live.fakes import FakeModel, PooledModel, arrived, picture

REDUCER = HoliTom(inner=None)
FRAMES = live_bench.FRAMES


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """A moving patch, in place of a decoded file."""

    def made(asked: live_bench.Asked, first_index: int = 0) -> live_bench.Clip:
        path, questions = asked
        number = int(path.stem)
        frames = [arrived(picture(5 * t + number, t % 16, 90), t / 2).frame for t in range(FRAMES)]
        numbered = [replace(f, index=first_index + t) for t, f in enumerate(frames)]
        return live_bench.Clip(path, tuple(numbered), tuple(questions))

    monkeypatch.setattr(live_bench, "read_clip", made)


def clip(number: int, answer: str) -> live_bench.Asked:
    return Path(f"{number}.mp4"), [Question("count", "#1", answer, ())]


def quiet(stage: str, done: int) -> None:
    pass


def run(name: str, clips: list[live_bench.Asked], log: Path) -> dict[str, dict[str, Any]]:
    result = live_bench.measured(name, FakeModel(), REDUCER, clips, 0, log, quiet)
    return {r["variant"]: r for r in result["rows"]}


def test_unlimited_lag_is_offline_and_tokens_are_alike(tmp_path: Path) -> None:
    clips = [clip(n, "32 frames from 0 to 15.5") for n in range(2)]
    told = run("accuracy", clips, tmp_path / "log.jsonl")
    assert told["offline"]["tokens"] == round(0.15 * FRAMES * 16)
    for variant in ("closed, unlimited lag", "closed, lag 8"):
        assert told[variant]["tokens"] <= told["offline"]["tokens"]
        assert told[variant]["accuracy"] == told["offline"]["accuracy"] == 100
    assert told["closed, unlimited lag"]["tokens"] == told["offline"]["tokens"]
    assert told["closed, unlimited lag"]["same_plans"] == told["anchor"]["n"] == 2
    assert told["closed, lag 8"]["same_plans"] == 0


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    clips = [clip(n, "32 frames from 0 to 15.5") for n in range(3)]
    log = tmp_path / "log.jsonl"
    first = run("accuracy", clips[:2], log)
    lines = log.read_text().splitlines()
    assert run("accuracy", clips[:2], log) == first
    assert log.read_text().splitlines() == lines
    assert run("accuracy", clips, log)["offline"]["n"] == 3
    assert log.read_text().splitlines()[: len(lines)] == lines


def test_the_past_needs_the_archive(tmp_path: Path) -> None:
    clips = [clip(n, "32 frames from 0 to 15.5") for n in range(5)]
    told = run("past", clips, tmp_path / "log.jsonl")
    assert told["just seen"]["n"] == 1
    assert told["just seen"]["accuracy"] == told["archive, by time"]["accuracy"] == 100
    assert told["window only"]["accuracy"] == 0
    assert told["window only"]["minus"] == -100


def test_a_busy_camera_gets_more_of_a_shared_budget(tmp_path: Path) -> None:
    clips = [clip(n, "") for n in range(4)]
    told = run("sharing", clips, tmp_path / "log.jsonl")
    assert told["equal split"]["n"] == 4
    assert told["shared by novelty"]["tokens"] > 2 * told["equal split"]["tokens"]


def test_a_long_run_says_how_it_bears_up() -> None:
    told = list(long_run(PooledModel(), REDUCER, 20, 1.0, quiet))
    assert [r["frames"] for r in told] == [20]
    assert told[0]["rss_mib"] > 0
    minutes = [
        {"media_s": 60.0 * m, "rss_mib": 100.0 + m, "first_token_ms": 10.0} for m in range(1, 61)
    ]
    assert hour_verdict(minutes) == {
        "rss_growth_pct": pytest.approx(100 * 50 / 110),
        "latency_growth_pct": 0.0,
    }


def test_fairness() -> None:
    assert fairness([4.0, 4.0, 4.0, 4.0]) == 1.0
    assert fairness([4.0, 0.0, 0.0, 0.0]) == 0.25
