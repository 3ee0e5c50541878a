"""A killed actor is started again and the run completes, as if nothing had been."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from stream.actors import run_ray
from stream.data import Answer, Frame, PatchGrid
from stream.errors import SourceError
from stream.pipeline import EncodedVideo, ReducedVideo, Reply, RunResult, run_inline
from stream.registry import build_reducer
from stream.sources import Uniform, open_source

QUESTIONS = ("how bright?", "how dark?")
REDUCER = build_reducer("dycoke")
FRAMES = 20


class Squares:
    """Encodes a frame as the colours of its 8 x 8 squares and answers by the brightest kept."""

    def encode(self, frames: Sequence[Frame]) -> EncodedVideo:
        pictures = torch.stack([torch.from_numpy(f.image) for f in frames]).float()
        squares = pictures.unfold(1, 8, 8).unfold(2, 8, 8).mean((-1, -2))
        grid = PatchGrid(*squares.shape[:3])
        return EncodedVideo(squares.flatten(0, 2), {}, grid, tuple(f.pts_s for f in frames))

    def answer(self, video: ReducedVideo, questions: Sequence[str]) -> Reply:
        brightest = int(video.x.sum(1).argmax())
        answers = tuple(Answer(q, (brightest, len(q)), 1.0) for q in questions)
        return Reply(answers, (video.plan,) * len(questions), (float(len(video.x)),))


@pytest.fixture(scope="module")
def inline(clip: Path) -> RunResult:
    with open_source(clip) as source:
        return run_inline(
            source, Uniform(FRAMES), Squares(), REDUCER, Squares(), QUESTIONS, retain=0.2
        )


def over_ray(clip: Path, **options: Any) -> RunResult:
    return run_ray(
        str(clip),
        "pyav",
        Uniform(FRAMES),
        Squares,
        REDUCER,
        Squares,
        QUESTIONS,
        retain=0.2,
        **options,
    )


@pytest.mark.usefixtures("one_ray")
@pytest.mark.parametrize("victim", ["source", "encoder", "reasoner"])
def test_a_killed_actor_restarts_and_the_run_completes(
    inline: RunResult, clip: Path, victim: str
) -> None:
    actors: dict[str, Any] = {}
    killed = []

    def kill_once(stage: str, done: int) -> None:
        if stage == "encode" and not killed:
            ray.get(actors[victim].pid.remote())
            ray.kill(actors[victim], no_restart=False)
            killed.append(victim)

    result = over_ray(clip, progress=kill_once, on_start=actors.update)
    assert killed == [victim]
    assert result.restarts == (victim,)
    assert result.video.plan.same_as(inline.video.plan)
    assert torch.equal(result.video.x, inline.video.x)
    assert result.reply.answers == inline.reply.answers
    assert [f.pts_s for f in result.frames] == [f.pts_s for f in inline.frames]


@pytest.mark.usefixtures("one_ray")
def test_an_error_in_an_actor_keeps_its_type(tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_text("not a video")
    with pytest.raises(SourceError, match=r"broken\.mp4"):
        over_ray(broken)


@pytest.mark.usefixtures("one_ray")
def test_workers_are_no_less_urgent_than_the_one_who_waits_for_them() -> None:
    """Beside other work they would hardly run: Ray's own niceness for them is 15."""

    def niceness() -> int:
        return os.nice(0)

    assert ray.get(ray.remote(niceness).remote()) == niceness()
