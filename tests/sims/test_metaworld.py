"""MetaWorld as environments: seeding, scenes, experts, what the robot sees."""

from __future__ import annotations

import numpy as np
import pytest

import sims
from sims.base import Environment, StepResult
from sims.tasks import CLUTTERED, TASKS
from stream.errors import UnknownNameError

pytestmark = pytest.mark.usefixtures("pictures")
NAMES = [f"metaworld:{task}" for task in TASKS]
MOVING = [name for name in NAMES if TASKS[name.removeprefix("metaworld:")].moving]


def play(env: Environment, seed: int) -> StepResult:
    env.reset(seed)
    while not (result := env.step(env.expert())).done:
        pass
    return result


def test_names_are_found_and_near_misses_named() -> None:
    assert set(NAMES) < set(sims.names())
    with pytest.raises(UnknownNameError, match="Did you mean 'metaworld:drawer-open'"):
        sims.make("metaworld:draw-open")


@pytest.mark.parametrize("name", NAMES)
def test_the_expert_solves_it(name: str) -> None:
    with sims.make(name) as env:
        solved = [play(env, seed) for seed in range(3)]
    assert sum(r.success for r in solved) >= 2
    assert all(0 <= r.score <= 1 for r in solved)


@pytest.mark.parametrize("name", NAMES)
def test_standing_still_solves_nothing(name: str) -> None:
    with sims.make(name) as env:
        env.reset(1)
        still = env.hold(None)
        for step in range(1, env.spec.max_steps + 1):
            result = env.step(still)
            assert not result.success
            assert result.done == (step == env.spec.max_steps)


@pytest.mark.parametrize("name", NAMES)
def test_an_episode_depends_on_its_seed_alone(name: str) -> None:
    def trace(env: Environment, seed: int) -> tuple[str, np.ndarray]:
        said = env.reset(seed)
        actions = []
        for _ in range(30):
            actions.append(env.expert())
            env.step(actions[-1])
        return said, np.array(actions)

    with sims.make(name) as env, sims.make(name) as other:
        said, first = trace(env, 5)
        _, different = trace(env, 6)
        again, second = trace(env, 5)
        elsewhere, third = trace(other, 5)
    assert said == again == elsewhere
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, third)
    assert not np.array_equal(first, different)


@pytest.mark.parametrize("name", ["metaworld:reach", "metaworld:push", "metaworld:pick-place"])
def test_the_instruction_names_one_of_several_goals(name: str) -> None:
    with sims.make(name) as env:
        assert len({env.reset(seed) for seed in range(12)}) == 3


def test_reaching_another_ball_is_no_success() -> None:
    with sims.make("metaworld:reach") as env:
        env.reset(0)
        goal, other, *_ = env._scene.balls.values()
        for _ in range(env.spec.max_steps):
            move = 10 * (other(0.0) - env._raw.tcp_center)
            result = env.step(np.array([*move, -1], dtype=np.float32))
            assert not result.success
        assert np.linalg.norm(env._raw.tcp_center - other(0.0)) < 0.02
        assert np.linalg.norm(env._raw.tcp_center - goal(0.0)) > 0.05


def test_hold_keeps_hand_and_gripper() -> None:
    with sims.make("metaworld:drawer-open") as env:
        env.reset(0)
        for _ in range(20):
            env.step(np.array([0.3, 0.2, -0.5, 0.8], dtype=np.float32))
        hold = env.hold(np.array([0.3, 0.2, -0.5, 0.8], dtype=np.float32))
        np.testing.assert_array_equal(hold, np.array([0, 0, 0, 0.8], dtype=np.float32))
        for _ in range(10):
            env.step(hold)
        before = env._feel()[:4]
        for _ in range(40):
            env.step(hold)
        np.testing.assert_allclose(env._feel()[:4], before, atol=3e-3)


def test_actions_are_clipped_to_the_limits() -> None:
    with sims.make("metaworld:reach") as env, sims.make("metaworld:reach") as other:
        env.reset(0)
        other.reset(0)
        for _ in range(10):
            env.step(np.array([9, 0, -9, 9], dtype=np.float32))
            other.step(np.array([1, 0, -1, 1], dtype=np.float32))
        np.testing.assert_array_equal(env._feel(), other._feel())


@pytest.mark.parametrize("name", MOVING)
def test_a_moving_world_moves_while_the_robot_stands(name: str) -> None:
    with sims.make(name) as env:
        assert env.spec.moving
        env.reset(2)
        still = env.hold(None)
        seen = []
        for _ in range(70):
            env.step(still)
            seen.append(np.hstack([env._raw._target_pos, env._feel()[4:7]]))
        assert np.ptp(seen, axis=0).max() > 0.04


def test_a_jump_must_be_followed() -> None:
    """Sitting on the first place until the end is no success, following is."""
    with sims.make("metaworld:reach-jump") as env:
        env.reset(3)
        first = env._scene.goal(0.0)
        results = []
        for _ in range(env.spec.max_steps):
            move = 10 * (first - env._raw.tcp_center)
            results.append(env.step(np.array([*move, -1], dtype=np.float32)))
        assert np.linalg.norm(env._raw.tcp_center - first) < 0.02
        assert not any(r.success for r in results)
        assert play(env, 3).success


@pytest.mark.parametrize("name", ["metaworld:door-open", *MOVING])
def test_what_the_robot_sees(name: str) -> None:
    with sims.make(name) as env:
        instruction = env.reset(0)
        seen = env.observe()
        again = env.observe()
        assert seen.instruction == instruction
        assert set(seen.images) == set(env.spec.cameras) == {"scene", "wrist"}
        for camera, image in seen.images.items():
            assert image is not None
            assert image.shape[:2] == env.spec.cameras[camera]
            assert image.std() > 10
            np.testing.assert_array_equal(image, again.images[camera])
        assert seen.state.shape == (env.spec.state_size,)
        np.testing.assert_allclose(seen.state, env._feel()[:4], rtol=1e-6)
        for _ in range(8):
            env.step(env.expert())
        later = env.observe()
        assert later.time_s == pytest.approx(8 * env.spec.dt_s)
        assert (later.images["scene"] != seen.images["scene"]).any()


def test_cameras_are_upright() -> None:
    """The far wall is above the table; what lies away from the robot is above in the wrist view."""
    with sims.make("metaworld:push") as env:
        env.reset(0)
        scene = env.observe().images["scene"].astype(int)
        wall, table = scene[:8, -32:].mean((0, 1)), scene[-8:, -32:].mean((0, 1))
        assert np.ptp(wall) < 20 < np.ptp(table)
        wrist = env._cameras._renderer
        wrist.update_scene(env._raw.data, "gripperPOV")
        camera = env._raw.data.camera("gripperPOV").xmat.reshape(3, 3)
        assert camera[1, 1] > 0.9


def test_markers_of_the_target_are_not_drawn() -> None:
    with sims.make("metaworld:drawer-open") as env:
        env.reset(0)
        before = env.observe().images
        env._raw.model.site("goal").rgba = [1, 0, 1, 1]
        env._raw.model.site("goal").size = [0.1, 0.1, 0.1]
        after = env.observe().images
    for camera in before:
        np.testing.assert_array_equal(before[camera], after[camera])


@pytest.mark.parametrize("name", ["metaworld:reach", "metaworld:push", "metaworld:pick-place"])
def test_the_goal_is_seen(name: str) -> None:
    """In the colour that the instruction names, in nearly every scene."""
    channel = {"red": 0, "green": 1, "blue": 2}
    seen = 0
    with sims.make(name) as env:
        for seed in range(8):
            color = env.reset(seed).split()[-2]
            image = env.observe().images["scene"].astype(int)
            others = np.delete(image, channel[color], axis=2).max(2)
            seen += int((image[..., channel[color]] > others + 70).sum() > 8)
    assert seen >= 7


@pytest.mark.parametrize("task", CLUTTERED)
def test_clutter_is_seen_and_changes_nothing_else(task: str) -> None:
    with sims.make(f"metaworld:{task}") as bare, sims.make(f"metaworld:{task}-clutter") as strewn:
        assert bare.reset(4) == strewn.reset(4)
        before, after = bare.observe().images, strewn.observe().images
        for _ in range(20):
            bare.step(bare.expert())
            strewn.step(strewn.expert())
    changed = (before["scene"] != after["scene"]).any(2).mean()
    assert 0.005 < changed < 0.2
    assert (before["wrist"] != after["wrist"]).any()
    np.testing.assert_array_equal(bare._feel(), strewn._feel())
