"""Playing the episodes of `foveate bench control`: which ones, and one of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from typing import TYPE_CHECKING

from stream.config import parse
from stream.errors import ConfigError

from .robot import Timing, controller_of, drive_config, load_policy, time_label, timing_of
from .settings import DriveSettings, reducer_of

if TYPE_CHECKING:
    from policies.vla.base import VLAPolicy
    from sims.base import Environment
    from sims.outcomes import Cell, Outcome

CONTROLS = {"oracle": "oracle", "blank": "blank pictures"}
"""Arms by their names on the command line, and in the table: all tokens in no time, and all tokens
of grey pictures."""


@dataclass(frozen=True, slots=True)
class Arm:
    """What is compared.

    method: a reducer with settings, as vla_pruner:mode=paper, or a control's name. keep: a share
    of the tokens; None leaves it to the deadline controller.
    """

    method: str
    keep: float | None

    @classmethod
    def of(cls, text: str) -> Arm:
        """METHOD@SHARE, METHOD@deadline, or one of the controls. Raises ConfigError otherwise."""
        if text in CONTROLS:
            return cls(CONTROLS[text], 1.0)
        method, _, keep = text.rpartition("@")
        try:
            share = None if keep == "deadline" else float(keep)
            if method and (share is None or 0 < share <= 1):
                return cls(method, share)
        except ValueError:
            pass
        raise ConfigError(
            f"The arm {text!r} must be METHOD@SHARE with a share in (0, 1], METHOD@deadline, "
            f"oracle or blank."
        )

    @property
    def is_control(self) -> bool:
        return self.method in CONTROLS.values()

    def settings(self, base: DriveSettings, budget_ms: float | None) -> DriveSettings:
        """`base` with this arm's reducer, share and budget; a control has the reducer of `base`."""
        waits = budget_ms is None
        chosen = base.model_copy(
            update={
                "budget_ms": budget_ms,
                "keep": self.keep,
                "mode": "waiting" if waits else "realtime",
                "time": "ms:0" if waits else base.time,
            }
        )
        if self.is_control:
            return chosen
        name, *given = self.method.split(":")
        overrides = [f"reducer={name}", "settings={}", *(f"settings.{s}" for s in given)]
        return parse(chosen.model_dump_json(), DriveSettings, overrides, origin=self.method)


@dataclass(frozen=True, slots=True)
class Job:
    """One episode of one arm.

    cell: the row it belongs to. settings: JSON of the DriveSettings that it is played with.
    """

    cell: Cell
    settings: str
    task: str
    seed: int

    @property
    def key(self) -> tuple[Cell, str, int]:
        """By which its outcome is found again."""
        return self.cell, self.task, self.seed


def jobs_of(
    arms: Sequence[Arm],
    tasks: Sequence[str],
    seeds: Sequence[int],
    budgets: Sequence[float],
    base: DriveSettings,
) -> list[Job]:
    """Every arm on every task and seed at every budget. Controls play once, in a world that waits,
    as all arms do when there are no budgets. Raises ConfigError for a deadline without a budget.
    """
    jobs = []
    for arm in arms:
        if arm.keep is None and not budgets:
            raise ConfigError(f"The arm {arm.method}@deadline needs --budgets, in milliseconds.")
        for budget in [None] if arm.is_control or not budgets else budgets:
            settings = arm.settings(base, budget)
            cell, text = cell_of(arm, settings), settings.model_dump_json()
            jobs += [Job(cell, text, task, seed) for task in tasks for seed in seeds]
    return jobs


def cell_of(arm: Arm, settings: DriveSettings) -> Cell:
    """The row of the results that an arm under these settings belongs to."""
    from sims.outcomes import Cell

    reducer = reducer_of(settings.reducer, **settings.settings)
    source = None if settings.budget_ms is None else time_label(settings)
    where = (settings.mode, settings.budget_ms, source)
    return Cell(*where, arm.method, str(reducer.site), arm.keep)


def play(job: Job) -> Outcome:
    """One episode. Policies, worlds and cards stay loaded in this process."""
    from sims.controls import Blank
    from sims.episode import Episode
    from sims.outcomes import Outcome
    from sims.tally import Tally

    settings = _settings(job.settings)
    world = _world(job.task)
    policy, timing = _ready(job.settings, job.task)
    episode = Episode(
        Blank(world) if job.cell.method == CONTROLS["blank"] else world,
        policy,
        controller_of(settings, timing.card, policy),
        timing.clock,
        drive_config(settings, settings.budget_ms),
    )
    tally = Tally()
    for tick in episode.run(job.seed):
        tally.add(tick)
    return Outcome(
        **job.cell._asdict(),
        task=job.task,
        seed=job.seed,
        success=tick.success,
        score=tick.score,
        steps=tally.steps,
        tokens=tally.mean_tokens,
        misses=None if settings.budget_ms is None else tally.missed,
        inferences=tally.inferences,
    )


def play_all(jobs: Sequence[Job], workers: int) -> Iterator[Outcome]:
    """Outcomes as they come, from this process or from several."""
    if workers == 1:
        yield from map(play, jobs)
        return
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_one_thread
    ) as pool:
        pending = [pool.submit(play, job) for job in jobs]
        try:
            for future in as_completed(pending):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _settings(text: str) -> DriveSettings:
    return DriveSettings.model_validate_json(text)


@cache
def _world(task: str) -> Environment:
    import sims

    return sims.make(task)


@cache
def _ready(settings_text: str, task: str) -> tuple[VLAPolicy, Timing]:
    settings = _settings(settings_text)
    chosen = settings.model_dump(include={"model", "reducer", "settings", "device"})
    policy = _policy(json.dumps(chosen))
    world = _world(task)
    world.reset(0)
    return policy, timing_of(settings, policy, world.observe())


@cache
def _policy(chosen: str) -> VLAPolicy:
    return load_policy(_settings(chosen))
