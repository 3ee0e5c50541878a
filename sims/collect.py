"""Demonstrations of many tasks as a few arrays in a folder, by many processes, for training.

Experts run twice: first blind, which is fast and says which episodes succeed and how long each is,
then with pictures, each written into its place of one big array. What is written depends on the
arguments alone, not on the number of processes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream.errors import ConfigError, SimulatorError, SourceError

from . import make
from .base import Environment, EnvironmentSpec
from .demos import FIRST_SEED, PATIENCE, Noise, common_spec, demonstrate, follow, hopeless

IMAGES, ROWS, ABOUT = "images.npy", "rows.npz", "about.json"
"""`about.json` comes last: a folder without it is not whole."""


@dataclass(frozen=True, slots=True)
class Collection:
    """n frames of e episodes, episode after episode, in the order of the tasks.

    images: uint8 [n, cameras, height, width, 3], memory-mapped. state: float32 [n, s]. action:
    float32 [n, a]. pixels: float32 [n, cameras, things, 2], where the environment's landmarks are
    in the images. starts: int64 [e + 1], the first row of each episode and n. task, instruction:
    int64 [e], positions in `tasks` and `instructions`. seed: int64 [e]. dt_s: between frames.
    dropped: task -> attempts of the expert that failed.
    """

    images: NDArray[np.uint8]
    state: NDArray[np.float32]
    action: NDArray[np.float32]
    pixels: NDArray[np.float32]
    starts: NDArray[np.int64]
    task: NDArray[np.int64]
    instruction: NDArray[np.int64]
    seed: NDArray[np.int64]
    tasks: tuple[str, ...]
    instructions: tuple[str, ...]
    cameras: tuple[str, ...]
    dt_s: float
    dropped: dict[str, int]

    @property
    def episode(self) -> NDArray[np.int64]:
        """int64 [n]: the episode of each frame."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    def ahead(self, steps: int) -> NDArray[np.int64]:
        """int64 [n, steps]: rows of each frame and the next ones, staying at its episode's last."""
        last = np.repeat(self.starts[1:] - 1, np.diff(self.starts))
        rows = np.arange(len(last))[:, None] + np.arange(steps)
        return np.minimum(rows, last[:, None])

    @classmethod
    def load(cls, folder: str | Path) -> Collection:
        """What `collect` wrote; the images stay on disk until they are touched."""
        folder = Path(folder)
        try:
            about = json.loads((folder / ABOUT).read_text())
            for name in ("tasks", "instructions", "cameras"):
                about[name] = tuple(about[name])
            with np.load(folder / ROWS) as rows:
                return cls(images=np.load(folder / IMAGES, mmap_mode="r"), **rows, **about)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SourceError(f"{folder} holds no whole collection: {error}.") from error


def collect(
    tasks: Sequence[str],
    episodes_per_task: int,
    processes: int,
    seed: int,
    out: str | Path,
    noise: Noise | None = None,
) -> Collection:
    """Record the experts of `tasks` (names of `sims.make`, of one robot) into the folder `out`.

    Call it under `if __name__ == "__main__":`, since the workers import the caller's module.
    Raises SimulatorError if an expert fails too often, ConfigError if the tasks' robots differ.
    """
    out, noise = Path(out), noise or Noise()
    if min(episodes_per_task, processes) < 1:
        raise ConfigError("episodes_per_task and processes must be at least 1.")
    if (out / ABOUT).exists():
        raise ConfigError(f"{out} holds a collection; load it, or give another folder.")
    spec = common_spec(tasks)
    out.mkdir(parents=True, exist_ok=True)
    with _workers(processes) as run:
        found = _search(run, tasks, episodes_per_task, FIRST_SEED * (seed + 1), noise)
        return _record(run, out, spec, found, noise)


@contextmanager
def _workers(processes: int) -> Iterator[Any]:
    """Something like `map` that works in so many processes; with one it is `map` itself."""
    if processes == 1:
        try:
            yield map
        finally:
            _let_go()
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sims.metaworld"])
    workers = ProcessPoolExecutor(processes, context, initializer=_ignore_interrupts)
    try:
        yield workers.map
    except BrokenExecutor as error:
        raise SimulatorError("A worker died; is there memory for all of them?") from error
    finally:
        workers.shutdown(cancel_futures=True)


@dataclass(slots=True)
class _Found:
    """The seeds at which a task's expert succeeds, and how many steps each episode takes."""

    task: str
    tried: int = 0
    seeds: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def add(self, seed: int, length: int) -> None:
        self.tried += 1
        if length:
            self.seeds.append(seed)
            self.lengths.append(length)


def _search(
    run: Any, tasks: Sequence[str], wanted: int, first_seed: int, noise: Noise
) -> list[_Found]:
    """The first `wanted` successes of every task, in rounds over all tasks at once."""
    found = [_Found(task) for task in tasks]
    while lacking := [f for f in found if len(f.seeds) < wanted]:
        for f in lacking:
            if f.tried >= PATIENCE * wanted:
                raise hopeless(f.task, len(f.seeds), f.tried, noise)
        jobs = [
            (f, first_seed + f.tried + i) for f in lacking for i in range(wanted - len(f.seeds))
        ]
        lengths = run(_length, [f.task for f, _ in jobs], [seed for _, seed in jobs], repeat(noise))
        for (f, seed), length in zip(jobs, lengths, strict=True):
            f.add(seed, length)
    return found


def _record(
    run: Any, out: Path, spec: EnvironmentSpec, found: Sequence[_Found], noise: Noise
) -> Collection:
    """Write the episodes found, with pictures, each into its place."""
    lengths = np.concatenate([f.lengths for f in found])
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    n, (height, width) = int(starts[-1]), next(iter(spec.cameras.values()))
    shape = (n, len(spec.cameras), height, width, 3)
    np.lib.format.open_memmap(out / IMAGES, "w+", np.uint8, shape).flush()  # type: ignore[no-untyped-call]
    episodes = [(f.task, seed) for f in found for seed in f.seeds]
    places = [out / IMAGES] * len(episodes), starts[:-1].tolist()
    written = list(run(_write, *zip(*episodes, strict=True), *places, repeat(noise)))
    said = [instruction for instruction, _ in written]
    rows = {name: np.concatenate([r[name] for _, r in written]) for name in written[0][1]}
    instructions = sorted(set(said))
    np.savez(
        out / ROWS,
        **rows,
        starts=starts,
        task=np.repeat(np.arange(len(found)), [len(f.seeds) for f in found]),
        instruction=np.array([instructions.index(s) for s in said]),
        seed=np.array([seed for _, seed in episodes]),
    )
    about = {
        "tasks": [f.task for f in found],
        "instructions": instructions,
        "cameras": list(spec.cameras),
        "dt_s": spec.dt_s,
        "dropped": {f.task: f.tried - len(f.seeds) for f in found},
    }
    (out / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
    return Collection.load(out)


_held: dict[str, Environment] = {}
"""A worker's environment; jobs come task by task."""


def _held_env(task: str) -> Environment:
    if task not in _held:
        _let_go()
        _held[task] = make(task)
    return _held[task]


def _let_go() -> None:
    for env in _held.values():
        env.close()
    _held.clear()


def _length(task: str, seed: int, noise: Noise) -> int:
    """Steps of the expert's episode, 0 if it fails."""
    actions: list[NDArray[np.float32]] = []
    return len(actions) if follow(_held_env(task), seed, noise, actions.append) else 0


def _write(
    task: str, seed: int, path: Path, start: int, noise: Noise
) -> tuple[str, dict[str, NDArray[np.float32]]]:
    """Put the episode's pictures into the file; returns the instruction and the rest by name."""
    episode = demonstrate(_held_env(task), seed, noise)
    if episode is None:
        raise SimulatorError(f"{task} with seed {seed} succeeded once and then failed.")
    np.load(path, mmap_mode="r+")[start : start + len(episode)] = episode.images
    rows = {"state": episode.state, "action": episode.action, "pixels": episode.pixels}
    return episode.instruction, rows


def _ignore_interrupts() -> None:
    """Ctrl-C is the parent's business; it ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sims.collect", description=__doc__)
    parser.add_argument("tasks", nargs="+", help="names of environments, such as metaworld:reach")
    parser.add_argument("--episodes", type=int, default=120, help="of each task")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    given = parser.parse_args()
    began = time.perf_counter()
    got = collect(given.tasks, given.episodes, given.processes, given.seed, given.out)
    took_s = time.perf_counter() - began
    sys.stdout.write(
        f"{len(got.state)} frames of {len(got.task)} episodes in {took_s:.1f} s with "
        f"{given.processes} processes; attempts that failed: {got.dropped}\n"
    )


if __name__ == "__main__":
    main()
