"""The pipeline in one process and over Ray gives the same; a killed actor does not end a run."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from policies.reasoner import VideoReasoner
from stream.actors import local_ray, run_ray
from stream.errors import SourceError
from stream.pipeline import RunResult, run_inline
from stream.registry import build_reducer
from stream.sources import Uniform, open_source

QUESTIONS = ["what color is the star?", "where is the square?"]
REDUCER = build_reducer("holitom")
FRAMES = 20


def reasoner(folder: Path) -> VideoReasoner:
    torch.set_num_threads(1)
    return VideoReasoner.load(str(folder), REDUCER, "cpu", max_new_tokens=2)


@pytest.fixture(scope="module")
def inline(checkpoint: Path, clip: Path) -> RunResult:
    model = reasoner(checkpoint)
    with open_source(clip) as source:
        return run_inline(
            source, Uniform(FRAMES), model, REDUCER, model, QUESTIONS, retain=0.2, seed=0
        )


@pytest.fixture(scope="module")
def one_ray() -> Iterator[None]:
    with local_ray():
        yield


def over_ray(checkpoint: Path, clip: Path, **options: Any) -> RunResult:
    model = partial(reasoner, checkpoint)
    return run_ray(
        str(clip), "pyav", Uniform(FRAMES), model, REDUCER, model, QUESTIONS, retain=0.2, **options
    )


def test_inline_meets_the_budget(inline: RunResult) -> None:
    step = inline.step
    assert step.tokens_in == FRAMES * 196
    assert step.tokens_out == step.budget_tokens == round(0.2 * step.tokens_in)
    assert len(inline.reply.answers) == len(QUESTIONS)
    assert len(inline.frames) == FRAMES
    assert {"decode", "encode", "reduce", "prefill", "decode_tokens"} <= set(step.timings_ms)
    assert inline.reply.layer_tokens[0] == step.tokens_out > inline.reply.layer_tokens[-1]


@pytest.mark.usefixtures("one_ray")
def test_ray_equals_inline(inline: RunResult, checkpoint: Path, clip: Path) -> None:
    result = over_ray(checkpoint, clip)
    assert result.video.plan.same_as(inline.video.plan)
    assert [a.token_ids for a in result.reply.answers] == [
        a.token_ids for a in inline.reply.answers
    ]
    assert [f.pts_s for f in result.frames] == [f.pts_s for f in inline.frames]
    assert result.restarts == ()


@pytest.mark.usefixtures("one_ray")
@pytest.mark.parametrize("victim", ["source", "encoder", "reasoner"])
def test_a_killed_actor_restarts_and_the_run_completes(
    inline: RunResult, checkpoint: Path, clip: Path, victim: str
) -> None:
    actors: dict[str, Any] = {}
    killed = []

    def kill_once(stage: str, done: int) -> None:
        if stage == "encode" and not killed:
            ray.get(actors[victim].pid.remote())
            ray.kill(actors[victim], no_restart=False)
            killed.append(victim)

    result = over_ray(checkpoint, clip, progress=kill_once, on_start=actors.update)
    assert killed == [victim]
    assert result.restarts == (victim,)
    assert result.video.plan.same_as(inline.video.plan)
    assert [f.pts_s for f in result.frames] == [f.pts_s for f in inline.frames]


@pytest.mark.usefixtures("one_ray")
def test_an_error_in_an_actor_keeps_its_type(checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_text("not a video")
    with pytest.raises(SourceError, match=r"broken\.mp4"):
        over_ray(checkpoint, broken)
