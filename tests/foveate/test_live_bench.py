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
FRAMES = 32


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def clip(number: int, answer: str) -> live_bench.Clip:
    frames = [arrived(picture(5 * t + number, t % 16, 90), t / 2).frame for t in range(FRAMES)]
    numbered = tuple(replace(f, index=number * FRAMES + t) for t, f in enumerate(frames))
    return live_bench.Clip(Path(f"{number}.mp4"), numbered, (Question("count", "#1", answer, ()),))


def quiet(stage: str, done: int) -> None:
    pass


def rows(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {r["variant"]: r for r in result["rows"]}


def test_unlimited_lag_is_offline_and_tokens_are_alike() -> None:
    clips = [clip(n, "32 frames from 0 to 15.5") for n in range(2)]
    result = live_bench.accuracy(FakeModel(), REDUCER, clips, 0, quiet)
    assert result["same_plans"] == result["clips"] == 2
    told = rows(result)
    assert told["offline"]["tokens"] == round(0.15 * FRAMES * 16)
    assert told["closed, unlimited lag"]["tokens"] == told["offline"]["tokens"]
    assert told["offline"]["accuracy"] == told["closed, lag 8"]["accuracy"] == 100
    assert told["anchor"]["n"] == 2


def test_the_past_needs_the_archive() -> None:
    clips = [clip(n, "32 frames from 0 to 15.5") for n in range(3)]
    told = rows(live_bench.past(FakeModel(), REDUCER, clips, 0, quiet))
    assert told["just seen"]["accuracy"] == told["archive, by time"]["accuracy"] == 100
    assert told["window only"]["accuracy"] == 0
    assert told["window only"]["minus"] == -100


def test_a_busy_camera_gets_more_of_a_shared_budget() -> None:
    clips = [clip(n, "") for n in range(4)]
    told = rows(live_bench.sharing(FakeModel(), REDUCER, clips, 0, quiet))
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
