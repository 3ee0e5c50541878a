"""Environments in other processes play exactly as here, and end with the pool."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest

import sims
from sims.pool import Batch, Pool, evaluate
from stream.errors import ConfigError, SimulatorError

pytestmark = pytest.mark.usefixtures("pictures")
JOBS = [("metaworld:reach", seed) for seed in range(3)] + [("metaworld:plate-slide", 7)]


def act(batch: Batch) -> np.ndarray:
    """A policy of sorts that depends on all that it is given: what it sees, feels and is told."""
    pull = batch.images.mean((1, 2, 3, 4)) / 255 - 0.5
    told = [len(said) / 30 for said in batch.instructions]
    actions = np.stack([pull, batch.state[:, 1] - 0.7, np.array(told) - 1, pull], axis=1)
    return np.repeat(actions[:, None].astype(np.float32), 40, axis=1)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(3, 2, "metaworld:reach") as pool:
        yield pool


def test_episodes_end_as_they_do_here(pool: Pool) -> None:
    outcomes = evaluate(pool, JOBS, act)
    for (name, seed), outcome in zip(JOBS, outcomes, strict=True):
        with sims.make(name) as env:
            env.reset(seed)
            steps, done = 0, False
            while not done:
                seen = env.observe()
                images = np.stack([seen.images[camera] for camera in env.spec.cameras])
                batch = Batch(
                    (0,), images[None], seen.state[None], (seen.instruction,), np.array([True])
                )
                for action in act(batch)[0]:
                    result, steps = env.step(action), steps + 1
                    if done := result.done:
                        break
        assert (outcome.name, outcome.seed, outcome.steps) == (name, seed, steps)
        assert (outcome.success, outcome.score) == (result.success, result.score)


def test_a_first_look_is_fresh(pool: Pool) -> None:
    pool.reset({0: JOBS[0], 2: JOBS[1]})
    assert pool.observe([2, 0]).fresh.tolist() == [True, True]
    pool.reset({2: JOBS[2]})
    seen = pool.observe([0, 2])
    assert seen.slots == (0, 2)
    assert seen.fresh.tolist() == [False, True]


def test_mistakes_are_told_and_leave_the_pool_usable(pool: Pool) -> None:
    with pytest.raises(ConfigError, match="no slots"):
        pool.reset({3: JOBS[0]})
    with (
        Pool(1, 1, "metaworld:reach") as fresh,
        pytest.raises(ConfigError, match="before its first reset"),
    ):
        fresh.observe([0])
    with pytest.raises(ConfigError, match="chunk is empty"):
        pool.step({0: np.zeros((0, 4), np.float32)})
    with pytest.raises(SimulatorError, match="step failed"):
        pool.step({0: np.zeros((1, 9), np.float32)})
    assert pool.reset({0: JOBS[0]})[0].startswith("reach the")


def test_workers_end_with_the_pool() -> None:
    pool = Pool(1, 1, "metaworld:reach")
    process = pool._workers[0][0]
    pool.reset({0: JOBS[0]})
    pool.close()
    assert process.exitcode == 0


def test_a_dead_worker_is_told() -> None:
    with Pool(1, 1, "metaworld:reach") as pool:
        pool.reset({0: JOBS[0]})
        os.kill(pool._workers[0][0].pid, signal.SIGKILL)
        with pytest.raises(SimulatorError, match="died"):
            pool.observe([0])


def test_slots_and_processes_are_checked() -> None:
    with pytest.raises(ConfigError, match="1 <= processes <= slots"):
        Pool(1, 2, "metaworld:reach")
