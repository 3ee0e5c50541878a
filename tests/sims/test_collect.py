"""Demonstrations as arrays: whole, in order, the same for any number of processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import sims
from sims.collect import Collection, collect
from sims.demos import CLEAN, FIRST_SEED, LINGER, Noise, demonstrate, follow
from stream.errors import ConfigError, SimulatorError, SourceError

pytestmark = pytest.mark.usefixtures("pictures")
TASKS = ("metaworld:reach", "metaworld:plate-slide")


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    return collect(TASKS, 2, 1, 0, tmp_path_factory.mktemp("collection"))


def test_noise_is_executed_and_never_taught() -> None:
    def wanted(noise: Noise) -> np.ndarray:
        actions: list[np.ndarray] = []
        with sims.make("metaworld:drawer-open") as env:
            assert follow(env, 1, noise, actions.append)
        return np.array(actions)

    clean, noisy = wanted(CLEAN), wanted(Noise(levels=(0.3,)))
    np.testing.assert_array_equal(clean[0], noisy[0])
    assert (clean[:40] != noisy[:40]).any()
    assert np.abs(noisy).max() <= 1


def test_it_stops_soon_after_success() -> None:
    with sims.make("metaworld:reach") as env:
        actions: list[np.ndarray] = []
        assert follow(env, 0, CLEAN, actions.append)
        env.reset(0)
        solved = [env.step(action).success for action in actions]
    assert solved.index(True) == len(actions) - LINGER - 1


def test_a_failure_is_no_demonstration(monkeypatch: pytest.MonkeyPatch) -> None:
    with sims.make("metaworld:reach") as env:
        monkeypatch.setattr(env, "expert", lambda: env.hold(None))
        assert not follow(env, 0, CLEAN, lambda _: None)


@pytest.mark.parametrize("levels", [(), (-0.1,)])
def test_noise_is_checked(levels: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="levels"):
        Noise(levels=levels)


def test_a_collection_holds_what_was_demonstrated(collection: Collection) -> None:
    assert collection.tasks == TASKS
    assert collection.task.tolist() == [0, 0, 1, 1]
    assert len(collection.images) == len(collection.state) == collection.starts[-1]
    with sims.make(TASKS[1]) as env:
        last = demonstrate(env, int(collection.seed[-1]), Noise())
    assert last is not None
    assert collection.seed[0] == FIRST_SEED
    rows = slice(*collection.starts[-2:])
    np.testing.assert_array_equal(collection.images[rows], last.images)
    np.testing.assert_array_equal(collection.state[rows], last.state)
    np.testing.assert_array_equal(collection.action[rows], last.action)
    np.testing.assert_array_equal(collection.pixels[rows], last.pixels)
    assert collection.instructions[collection.instruction[-1]] == last.instruction
    loaded = Collection.load(Path(str(collection.images.filename)).parent)
    np.testing.assert_array_equal(loaded.action, collection.action)


def test_rows_ahead_stay_in_their_episode(collection: Collection) -> None:
    ahead = collection.ahead(8)
    assert ahead.shape == (len(collection.state), 8)
    np.testing.assert_array_equal(ahead[:, 0], np.arange(len(collection.state)))
    np.testing.assert_array_equal(
        collection.episode[ahead], np.repeat(collection.episode[:, None], 8, 1)
    )
    end = collection.starts[1]
    assert ahead[end - 2].tolist() == [end - 2] + [end - 1] * 7


def test_processes_change_nothing(collection: Collection, tmp_path: Path) -> None:
    again = collect(TASKS[:1], 2, 2, 0, tmp_path)
    n = len(again.action)
    assert n == collection.starts[2]
    np.testing.assert_array_equal(again.images, collection.images[:n])
    np.testing.assert_array_equal(again.action, collection.action[:n])


def test_a_broken_expert_is_named(tmp_path: Path) -> None:
    with pytest.raises(SimulatorError, match="plate-slide succeeded in 0 of 4"):
        collect(["metaworld:plate-slide"], 1, 1, 0, tmp_path, Noise((50.0,), 1.0, 1000))
    with pytest.raises(SourceError, match="holds no whole collection"):
        Collection.load(tmp_path)


def test_different_robots_are_not_mixed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="different robots"):
        collect(["metaworld:reach", "pusht"], 1, 1, 0, tmp_path)
