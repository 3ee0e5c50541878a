"""MetaWorld 3.0 as environments: raw V3 tasks, own cameras, real seeding, scenes with a choice.

The arm is driven at 80 Hz by differences of the hand's position (a full action is 1 cm) and a
gripper command, -1 open, 1 closed.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream.data import Observation

from .base import Environment, EnvironmentSpec, StepResult
from .cameras import NAMES, Cameras, Ornament, import_mujoco
from .clutter import strewn
from .scenes import BALL_RADIUS, GOAL_COLORS, Point, Scene
from .tasks import TASKS

DT_S = 1 / 80
TRACKED = 0.6
"""Share of the episode on target from which a tracking episode counts as solved."""
BELT_END = 0.12
PUCK_COLOR = (0.95, 0.85, 0.1, 1.0)
OTHER_PUCK_COLOR = (0.55, 0.1, 0.6, 1.0)
STAND_COLOR = (0.3, 0.3, 0.3)
BELT_COLOR = (0.1, 0.1, 0.1)
TOUCH_M = 0.05


class MetaWorld(Environment):
    """One task of `TASKS` by its name. pixels: side of both camera pictures.

    The state is the hand's position (3) and the gripper's opening in [0, 1], never an object's.
    """

    def __init__(self, task: str, pixels: int = 128) -> None:
        self._task = TASKS[task]
        self._raw = _raw(self._task.base, with_pucks=self._task.layout is not None)
        self._expert = _expert(self._task.base)
        self._cameras: Cameras | None = None
        self._pixels = pixels
        self._spec = EnvironmentSpec(
            name=f"metaworld:{task}",
            dt_s=DT_S,
            cameras=dict.fromkeys(NAMES, (pixels, pixels)),
            state_size=4,
            action_low=(-1.0,) * 4,
            action_high=(1.0,) * 4,
            max_steps=self._task.max_steps,
            moving=self._task.moving,
        )
        self._scene: Scene | None = None
        self._clutter: list[Ornament] = []
        self._instruction = ""
        self._steps = self._on_target = 0
        self._belt_speed = 0.0

    @property
    def spec(self) -> EnvironmentSpec:
        return self._spec

    def reset(self, seed: int) -> str:
        self._raw.seed(seed)
        self._raw.reset()
        self._steps = self._on_target = 0
        self._scene = None
        self._instruction = self._task.instruction
        if self._task.layout:
            self._scene = self._task.layout(np.random.default_rng(seed))
            self._instruction = self._instruction.format(color=self._scene.color)
            self._lay_out(self._scene)
        self._clutter = self._strewn(np.random.default_rng((seed, 1)))
        return self._instruction

    def observe(self) -> Observation:
        return Observation(
            images=self._eyes().render(self._raw.data, self._ornaments()),
            state=self._feel()[:4].astype(np.float32),
            instruction=self._instruction,
            time_s=self._steps * DT_S,
        )

    def landmarks(self) -> NDArray[np.float32]:
        nowhere = np.full(3, np.nan)
        handled = nowhere if self._task.base == "reach" else self._feel()[4:7]
        points = np.array([self._raw.tcp_center, handled, self._raw._target_pos])
        return self._eyes().locate(self._raw.data, points)

    def step(self, action: NDArray[np.float32]) -> StepResult:
        self._steps += 1
        if self._scene:
            self._raw._target_pos = self._scene.goal(self._steps * DT_S)
            self._run_belt()
        info = self._raw.step(np.clip(action, -1, 1).astype(np.float32))[4]
        on_target = bool(info["success"])
        self._on_target += on_target
        over = self._steps >= self._task.max_steps
        if self._task.tracking:
            score = self._on_target / self._steps
            return StepResult(over and score >= TRACKED, over, score)
        success = on_target and self._counts()
        return StepResult(success, success or over, float(success))

    def hold(self, last: NDArray[np.float32] | None) -> NDArray[np.float32]:
        gripper = -1.0 if last is None else last[3]
        return np.array([0, 0, 0, gripper], dtype=np.float32)

    def expert(self) -> NDArray[np.float32]:
        feel = self._feel()
        goal = self._raw._target_pos
        if self._task.base == "reach":
            move = 10 * (goal - self._raw.tcp_center)
            return np.asarray(np.clip([*move, -1], -1, 1), dtype=np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that its own gains exceed the limits
            action = self._expert.get_action(np.hstack([feel, feel, goal]))
        return np.asarray(np.clip(action, -1, 1), dtype=np.float32)

    def close(self) -> None:
        if self._cameras is not None:
            self._cameras.close()
            self._cameras = None

    def _eyes(self) -> Cameras:
        if self._cameras is None:
            self._cameras = Cameras(self._raw.model, self._pixels)
        return self._cameras

    def _feel(self) -> NDArray[np.float64]:
        """MetaWorld's own 18 numbers; its `_get_obs` would change its state."""
        return np.asarray(self._raw._get_curr_obs_combined_no_goal())

    def _lay_out(self, scene: Scene) -> None:
        raw = self._raw
        raw._target_pos = scene.goal(0.0)
        raw.obj_init_pos = scene.puck
        raw.data.joint("objjoint").qpos[:3] = scene.puck
        raw.data.joint("other_puck").qpos[:3] = scene.other_puck
        raw.data.qvel[:] = 0
        self._belt_speed = scene.belt_speed
        import_mujoco().mj_forward(raw.model, raw.data)

    def _counts(self) -> bool:
        return not self._scene or self._steps * DT_S >= self._scene.counts_from_s

    def _run_belt(self) -> None:
        """Carry the puck along x, turning round at the belt's ends, until it is touched."""
        if not self._belt_speed:
            return
        puck = self._raw.data.joint("objjoint")
        if math.dist(puck.qpos[:3], self._raw.tcp_center) < TOUCH_M:
            self._belt_speed = 0.0
            return
        if abs(puck.qpos[0]) > BELT_END:
            self._belt_speed = math.copysign(self._belt_speed, -puck.qpos[0])
        puck.qpos[0] += self._belt_speed * DT_S

    def _strewn(self, rng: np.random.Generator) -> list[Ornament]:
        """Clutter beside the way from the hand by the handled thing to the goal."""
        handled = () if self._task.base == "reach" else (self._feel()[4:7],)
        path = (self._raw.tcp_center, *handled, self._raw._target_pos)
        others: list[Point] = []
        if self._scene:
            balls = [ball(0.0) for ball in self._scene.balls.values()]
            others = [self._scene.puck, self._scene.other_puck, *balls]
        return strewn(rng, self._task.clutter, path, others)

    def _ornaments(self) -> list[Ornament]:
        """The balls, on stands where they hang in the air, the belt and the clutter."""
        if self._scene is None:
            return self._clutter
        ornaments = [*self._clutter]
        for color, path in self._scene.balls.items():
            center = path(self._steps * DT_S)
            size = (BALL_RADIUS, 0.0, 0.0)
            ornaments.append(Ornament("sphere", size, center, GOAL_COLORS[color]))
            if center[2] > BALL_RADIUS:
                half = center[2] / 2
                foot = np.array([center[0], center[1], half])
                ornaments.append(Ornament("cylinder", (0.006, half, 0.0), foot, STAND_COLOR))
        if self._scene.belt_speed:
            middle = np.array([0.0, self._scene.puck[1], 0.0])
            ornaments.append(Ornament("box", (BELT_END + 0.04, 0.03, 0.001), middle, BELT_COLOR))
        return ornaments


def _raw(base: str, with_pucks: bool) -> Any:
    """MetaWorld's environment `base`, drawn from its own seeded generator at every reset."""
    mujoco = import_mujoco()
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    class Raw(ALL_V3_ENVIRONMENTS[f"{base}-v3"]):  # type: ignore[misc]
        max_path_length = 1 << 30

        def _initialize_simulation(self) -> tuple[Any, Any]:
            spec = mujoco.MjSpec.from_file(self.fullpath)
            if with_pucks:
                _color_pucks(mujoco, spec)
            model = spec.compile()
            return model, mujoco.MjData(model)

        def reset_mocap_welds(self) -> None:
            """MetaWorld's own writes 11 numbers; MuJoCo 4 has a twelfth."""
            welds = self.model.eq_type == mujoco.mjtEq.mjEQ_WELD
            self.model.eq_data[welds, :11] = [0, 0, 0, 0, 0, 0, -1, 0, 0, 0, 5]

    raw = Raw()
    raw.seeded_rand_vec, raw._freeze_rand_vec, raw._set_task_called = True, False, True
    return raw


def _color_pucks(mujoco: Any, spec: Any) -> None:
    geom = spec.geom("objGeom")
    geom.material, geom.rgba = "", PUCK_COLOR
    puck = spec.body("obj")
    other = spec.worldbody.add_body(
        name="other_puck", mass=puck.mass, inertia=puck.inertia, explicitinertial=True
    )
    other.add_freejoint(name="other_puck")
    other.add_geom(
        name="other_puck",
        type=mujoco.mjtGeom.mjGEOM_CYLINDER,
        size=geom.size,
        rgba=OTHER_PUCK_COLOR,
        friction=geom.friction,
        condim=geom.condim,
        solref=geom.solref,
        solimp=geom.solimp,
    )


def _expert(base: str) -> Any:
    from metaworld.policies import ENV_POLICY_MAP

    found: Any = ENV_POLICY_MAP[f"{base}-v3"]
    return found()
