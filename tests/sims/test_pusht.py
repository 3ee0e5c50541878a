"""PushT as an environment of absolute targets."""

from __future__ import annotations

import numpy as np
import pytest

import sims
from stream.errors import SimulatorError


def test_an_episode_depends_on_its_seed_alone() -> None:
    with sims.make("pusht") as env:
        frames = []
        for seed in (3, 4, 3):
            env.reset(seed)
            for _ in range(5):
                result = env.step(np.array([200, 300], dtype=np.float32))
            frames.append(env.observe().images["top"])
        assert not result.done
        assert 0 <= result.score < 0.95
    np.testing.assert_array_equal(frames[0], frames[2])
    assert (frames[0] != frames[1]).any()


def test_hold_is_the_last_target_and_never_zeros() -> None:
    with sims.make("pusht") as env:
        env.reset(0)
        start = env.observe().state
        np.testing.assert_allclose(env.hold(None), start)
        target = start + np.float32(40)
        for _ in range(30):
            env.step(target)
        np.testing.assert_array_equal(env.hold(target), target)
        np.testing.assert_allclose(env.observe().state, target, atol=1)


def test_targets_are_clipped_to_the_board() -> None:
    with sims.make("pusht") as env, sims.make("pusht") as other:
        env.reset(0)
        other.reset(0)
        env.step(np.array([-100, 9000], dtype=np.float32))
        other.step(np.array([0, 512], dtype=np.float32))
        np.testing.assert_array_equal(env.observe().state, other.observe().state)


def test_the_state_says_nothing_of_the_block() -> None:
    with sims.make("pusht") as env:
        env.reset(0)
        assert env.observe().state.shape == (env.spec.state_size,) == (2,)


def test_there_is_no_expert_and_it_says_so() -> None:
    with sims.make("pusht") as env, pytest.raises(SimulatorError, match="no scripted expert"):
        env.expert()
