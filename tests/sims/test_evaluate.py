"""Closed-loop evaluation in batches: cells, slots with memories of their own, what is missing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, cast

import numpy as np
import pytest
import torch

from policies.vla import load
from policies.vla.openvla import OpenVLAPolicy
from sims.base import StepResult
from sims.evaluate import Cell, Player, cells_of, missing, play, summary
from sims.pool import Batch, Pool
from stream.errors import ConfigError, UnknownNameError
from stream.reducers.vla_pruner import STATE
from tests.policies.vla.openvla_parts import PX, TEXTS, policy


class Stillness:
    """A pool of worlds that last for as many chunks as their seed says."""

    slots = 2

    def __init__(self) -> None:
        self.left: dict[int, int] = {}
        self.fresh: dict[int, bool] = {}
        self.said: dict[int, str] = {}

    def reset(self, jobs: Mapping[int, tuple[str, int]]) -> None:
        for slot, (name, seed) in jobs.items():
            self.left[slot], self.fresh[slot], self.said[slot] = seed, True, name

    def observe(self, slots: Sequence[int]) -> Batch:
        images = np.array([np.full((2, PX, PX, 3), 10 * s + self.left[s], np.uint8) for s in slots])
        fresh = np.array([self.fresh[s] for s in slots])
        self.fresh |= dict.fromkeys(slots, False)
        said = tuple(self.said[s] for s in slots)
        return Batch(tuple(slots), images, np.zeros((len(slots), 4), np.float32), said, fresh)

    def step(self, chunks: Mapping[int, Any]) -> dict[int, tuple[StepResult, int]]:
        results = {}
        for slot, chunk in chunks.items():
            self.left[slot] -= 1
            done = self.left[slot] == 0
            results[slot] = (StepResult(done, done, float(done)), len(chunk))
        return results


def player(cell: Cell) -> Player:
    torch.manual_seed(0)
    return Player(policy("parallel", cell.reducer), cell, Lock())


def test_cells_and_their_names() -> None:
    cells = cells_of(["fastv:layer=2", "vla_pruner:mode=paper", "divprune"], [1.0, 0.25], True)
    assert [(c.method, c.site, c.keep, c.pictures) for c in cells] == [
        ("full", "input", 1.0, "own"),
        ("blank pictures", "input", 1.0, "blank"),
        ("other pictures", "input", 1.0, "other"),
        ("fastv", "layer 2", 0.25, "own"),
        ("vla_pruner:mode=paper", "layer 3", 0.25, "own"),
        ("divprune", "input", 0.25, "own"),
    ]
    with pytest.raises(UnknownNameError, match="fastv"):
        Cell.of("fastw", 0.5)
    with pytest.raises(ConfigError, match="layers"):
        Cell.of("fastv:layers=2", 0.5)


@pytest.mark.parametrize(
    ("method", "tokens"),
    [("vla_pruner:layer=2", 8), ("vla_pruner:mode=paper:layer=2", (10 * 32 + 4 * 8) / 14)],
    ids=["default", "paper, whole in its first three"],
)
def test_slots_in_different_steps_of_their_episodes_play_together(
    method: str, tokens: float
) -> None:
    jobs = [(TEXTS[i % 2], seed) for i, seed in enumerate((6, 3, 4, 1))]
    one = policy("parallel")
    lines = play(Cell.of(method, 0.25), jobs, cast(Pool, Stillness()), one, Lock())
    assert [(x["task"], x["seed"]) for x in lines] == jobs
    assert [x["steps"] for x in lines] == [3 * seed for _, seed in jobs]
    assert {(x["success"], x["tokens"], x["mode"]) for x in lines} == {(True, tokens, "waiting")}


def test_a_fresh_episode_forgets_the_last() -> None:
    pool, act = Stillness(), player(Cell.of("vla_pruner:layer=2", 0.25))
    pool.reset({0: (TEXTS[0], 3), 1: (TEXTS[1], 3)})
    for _ in range(2):
        act(pool.observe([0, 1]))
    pool.reset({1: (TEXTS[0], 3)})
    act(pool.observe([0, 1]))
    histories = [act.memories[slot].state[STATE] for slot in (0, 1)]
    assert [(h.epoch, len(h.glances)) for h in histories] == [(0, 3), (1, 1)]


def test_controls_show_something_else() -> None:
    pool = Stillness()
    pool.reset({0: (TEXTS[0], 3), 1: (TEXTS[1], 4)})
    batch = pool.observe([0, 1])
    blank, other = (player(c) for c in cells_of([], [], controls=True))
    assert (blank._shown(batch) == 128).all()
    assert np.array_equal(other._shown(batch), batch.images[::-1])
    alone = pool.observe([0])
    assert np.array_equal(other._shown(alone)[0], batch.images[1])


def test_what_is_in_the_file_is_not_played_again(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    jobs = [("push", 0), ("push", 1), ("reach", 0)]
    cells = [Cell.of("fastv:layer=2", 0.5), Cell.of("divprune", 0.5)]
    whole = [left for _, left in missing(cells, jobs, out, "openvla")]
    assert whole == [jobs[:2]] * 2 + [jobs[2:]] * 2
    lines = play(cells[0], [(TEXTS[0], 1)], cast(Pool, Stillness()), policy("parallel"), Lock())
    lines[0] |= {"task": "push"}
    out.write_text(json.dumps(lines[0]) + "\n")
    assert [left for _, left in missing(cells, jobs, out, "openvla")] == [
        [("push", 0)],
        jobs[:2],
        jobs[2:],
        jobs[2:],
    ]
    assert [left for _, left in missing(cells, jobs, out, "another")] == whole
    assert summary(out).row_count == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("pictures")
def test_the_policy_in_the_box_opens_a_drawer_by_sight() -> None:
    jobs = [("metaworld:drawer-open", 0)]
    in_the_box = cast(OpenVLAPolicy, load("tiny-vla", device="cpu"))
    with Pool(1, 1, jobs[0][0]) as pool:
        for cell, solved in (Cell.of("vla_pruner", 0.25), True), (cells_of([], [], True)[0], False):
            (line,) = play(cell, jobs, pool, in_the_box, Lock())
            assert line["success"] == solved
