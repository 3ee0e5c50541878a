"""`foveate demos` and `foveate bench experts`: scripted experts, recorded and measured."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..show import err, out, print_json, progress_bars, table

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sims import Environment, StepResult
    from sims.demos import Demonstration
    from stream.sinks.lerobot_writer import LeRobotWriter

DONE = "meta/foveate.json"
"""What a dataset holds of which task, so that the same command goes on with it."""


def demos(
    tasks: list[str], folder: Path, episodes: int, levels: str, seed: int, as_json: bool
) -> None:
    """Record until there are so many episodes of each task; failures are dropped and counted.

    After Ctrl-C the episode at hand is finished, and the same command goes on with the next.
    """
    import sims
    from sims.demos import FIRST_SEED, PATIENCE, Noise, common_spec, demonstrate, hopeless
    from stream.errors import ConfigError
    from stream.sinks.lerobot_writer import LeRobotWriter

    try:
        noise = Noise(tuple(float(level) for level in levels.split(",")))
    except ValueError as error:
        raise ConfigError(f"--noise {levels}: {error}; give numbers by comma: 0,0.15.") from None
    spec = common_spec(tasks)
    begun = {"noise": levels, "seed": seed}
    counts = _read(folder / DONE, begun)
    for task in tasks:
        counts.setdefault(task, {"recorded": 0, "tried": 0})
    totals: dict[str, int | None] = dict.fromkeys(tasks, episodes)
    robot = tasks[0].partition(":")[0]
    sizes = spec.state_size, spec.action_size
    with (
        LeRobotWriter(folder, 1 / spec.dt_s, spec.cameras, *sizes, robot) as writer,
        _interrupts() as interrupted,
        progress_bars(totals) as update,
    ):
        for task in tasks:
            count = counts[task]
            with sims.make(task) as env:
                while count["recorded"] < episodes:
                    if count["tried"] >= PATIENCE * episodes:
                        raise hopeless(task, count["recorded"], count["tried"], noise)
                    shown = demonstrate(env, FIRST_SEED + seed + count["tried"], noise)
                    count["tried"] += 1
                    if shown:
                        _write(writer, tuple(spec.cameras), shown)
                        count["recorded"] += 1
                    record = json.dumps({**begun, "tasks": counts}, indent=2)
                    (folder / DONE).write_text(record + "\n")
                    update(task, count["recorded"])
                    if interrupted():
                        err.print(f"{writer.episodes} episodes are whole; the same command goes on")
                        raise KeyboardInterrupt
        recorded = writer.episodes
    rows = [(t, c["recorded"], c["tried"] - c["recorded"]) for t, c in counts.items()]
    if as_json:
        print_json(
            {
                "dataset": str(folder),
                "episodes": recorded,
                **begun,
                "tasks": {t: {"recorded": n, "dropped": d} for t, n, d in rows},
            }
        )
        return
    title = f"{folder}: {recorded} episodes, noise {levels}, seed {seed}"
    out.print(table(title, ("task", "recorded", "dropped failures"), rows))


def experts(tasks: list[str] | None, episodes: int, seed: int, as_json: bool) -> None:
    """Play each task's clean expert, and stand still in the same episodes for comparison."""
    import sims

    names = tasks or [name for name in sims.names() if name != "pusht"]
    rows: list[dict[str, Any]] = []
    with progress_bars({"experts": len(names)}) as update:
        for name in names:
            with sims.make(name) as env:
                seeds = range(seed, seed + episodes)
                played = [_play(env, s, _follow) for s in seeds]
                still = [_play(env, s, _stand) for s in seeds]
            steps = [taken for result, taken in played if result.success] or [0]
            rows.append(
                {
                    "task": name,
                    "solved": sum(result.success for result, _ in played),
                    "standing still": sum(result.success for result, _ in still),
                    "episodes": episodes,
                    "mean score": round(float(np.mean([r.score for r, _ in played])), 3),
                    "steps p50": int(np.median(steps)),
                    "steps p95": int(np.quantile(steps, 0.95, method="higher")),
                    "limit": env.spec.max_steps,
                }
            )
            update("experts", len(rows))
    if as_json:
        print_json({"seed": seed, "experts": rows})
        return
    title = f"Scripted experts, seeds {seed} to {seed + episodes - 1}"
    out.print(table(title, list(rows[0]), [list(row.values()) for row in rows]))


def _read(path: Path, begun: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Recorded and tried episodes of each task of a dataset that was begun with these settings."""
    from stream.errors import ConfigError

    if not path.exists():
        return {}
    there = json.loads(path.read_text())
    counts: dict[str, dict[str, int]] = there.pop("tasks")
    if there != begun:
        raise ConfigError(f"{path.parents[1]} was begun with {there}; go on with it so.")
    return counts


def _write(writer: LeRobotWriter, cameras: tuple[str, ...], shown: Demonstration) -> None:
    for images, state, action in zip(shown.images, shown.state, shown.action, strict=True):
        seen = dict(zip(cameras, images, strict=True))
        writer.add(seen, state, action, shown.instruction)
    writer.end_episode()


def _follow(env: Environment) -> NDArray[np.float32]:
    return env.expert()


def _stand(env: Environment) -> NDArray[np.float32]:
    return env.hold(None)


def _play(
    env: Environment, seed: int, choose: Callable[[Environment], NDArray[np.float32]]
) -> tuple[StepResult, int]:
    """How the episode ended, and after how many steps."""
    env.reset(seed)
    steps = 1
    while not (result := env.step(choose(env))).done:
        steps += 1
    return result, steps


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Within it the first Ctrl-C is only noted; a second one interrupts."""
    noted = False

    def note(number: int, frame: Any) -> None:
        nonlocal noted
        noted = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)
