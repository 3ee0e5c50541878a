"""The pipeline with a real model gives the same in one process and over Ray."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from policies.reasoner import VideoReasoner
from stream.actors import run_ray
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
    model = partial(reasoner, checkpoint)
    result = run_ray(
        str(clip), "pyav", Uniform(FRAMES), model, REDUCER, model, QUESTIONS, retain=0.2
    )
    assert result.video.plan.same_as(inline.video.plan)
    assert [a.token_ids for a in result.reply.answers] == [
        a.token_ids for a in inline.reply.answers
    ]
    assert [f.pts_s for f in result.frames] == [f.pts_s for f in inline.frames]
    assert result.restarts == ()
