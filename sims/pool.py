"""Many environments in many processes, stepped together, for closed-loop evaluation in batches.

Each slot plays one episode at a time and keeps its environment until it plays another task.
Pictures come through shared memory.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream.closing import Closing
from stream.errors import ConfigError, FoveateError, SimulatorError

from . import make
from .base import Environment, StepResult

PATIENCE_S = 120.0
"""After which a worker that does not answer counts as stuck. Building a first environment is slow.
"""


@dataclass(frozen=True, slots=True)
class Batch:
    """What m slots see.

    slots: which ones. images: uint8 [m, cameras, height, width, 3], a copy. state: float32 [m, s].
    fresh: bool [m], whether this is the first look at an episode, when a policy forgets the last.
    """

    slots: tuple[int, ...]
    images: NDArray[np.uint8]
    state: NDArray[np.float32]
    instructions: tuple[str, ...]
    fresh: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an episode ended after so many control periods."""

    name: str
    seed: int
    success: bool
    score: float
    steps: int


Act = Callable[[Batch], NDArray[np.float32]]
"""Action chunks float32 [m, k, a] for what m slots see."""


class Pool(Closing):
    """`slots` environments in `processes` workers.

    like: the name of one of the environments to be played, for the size of the pictures.
    The workers import the caller's module: call it under `if __name__ == "__main__":`.
    """

    def __init__(self, slots: int, processes: int, like: str) -> None:
        if not 1 <= processes <= slots:
            raise ConfigError(f"{slots} slots in {processes} processes: 1 <= processes <= slots.")
        with make(like) as env:
            spec = env.spec
        self.slots = slots
        shape = (slots, len(spec.cameras), *next(iter(spec.cameras.values())), 3)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["sims.metaworld"])
        shared = context.RawArray("B", int(np.prod(shape)))
        self._images = np.frombuffer(shared, np.uint8).reshape(shape)
        self._workers: list[tuple[Any, Connection]] = []
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, shared, shape), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def reset(self, jobs: Mapping[int, tuple[str, int]]) -> dict[int, str]:
        """Begin episodes, slot -> (environment's name, seed); returns their instructions."""
        return self._ask("reset", jobs)

    def observe(self, slots: Sequence[int]) -> Batch:
        """What these slots see; each must have been reset."""
        seen = self._ask("observe", dict.fromkeys(slots, ()))
        states, instructions, fresh = zip(*(seen[slot] for slot in slots), strict=True)
        return Batch(
            tuple(slots),
            self._images[list(slots)],
            np.array(states),
            instructions,
            np.array(fresh),
        )

    def step(self, chunks: Mapping[int, NDArray[np.float32]]) -> dict[int, tuple[StepResult, int]]:
        """Execute a chunk [k, a] in each slot, or less of it where the episode ends.

        Returns the last step's result and how many steps were executed.
        """
        return self._ask("step", {slot: (chunk,) for slot, chunk in chunks.items()})

    def close(self) -> None:
        """End the workers; those that do not come to an end by themselves are killed."""
        for _, connection in self._workers:
            with suppress(OSError):
                connection.send(None)
        for process, connection in self._workers:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
            connection.close()
        self._workers.clear()

    def _ask(self, method: str, jobs: Mapping[int, Any]) -> dict[int, Any]:
        """Let each slot's worker call `method` with the slot's arguments; slot -> result."""
        if unknown := [slot for slot in jobs if not 0 <= slot < self.slots]:
            raise ConfigError(f"There are no slots {unknown}; there are 0 to {self.slots - 1}.")
        shares: dict[int, dict[int, Any]] = {}
        for slot, arguments in jobs.items():
            shares.setdefault(slot % len(self._workers), {})[slot] = arguments
        for worker, share in shares.items():
            self._workers[worker][1].send((method, share))
        replies = [self._reply(worker) for worker in shares]
        for reply in replies:
            if isinstance(reply, FoveateError):
                raise reply
        return {slot: result for reply in replies for slot, result in reply.items()}

    def _reply(self, worker: int) -> Any:
        connection = self._workers[worker][1]
        try:
            if connection.poll(PATIENCE_S):
                return connection.recv()
            problem = f"did not answer within {PATIENCE_S:.0f} s"
        except (EOFError, OSError):
            problem = "died; is there memory for all environments?"
        return SimulatorError(f"Worker {worker} of the pool {problem}. Close the pool.")


def evaluate(pool: Pool, jobs: Sequence[tuple[str, int]], act: Act) -> list[Outcome]:
    """Play every (environment's name, seed) once, in waiting mode; outcomes in the jobs' order.

    A slot whose episode ends goes on with the next job, so that batches stay full. Order the jobs
    by name: slots then build few environments, and a slot holds one at a time.
    """
    waiting = list(enumerate(jobs))[::-1]
    playing: dict[int, int] = {}
    steps = [0] * len(jobs)
    outcomes: dict[int, Outcome] = {}
    while waiting or playing:
        started = {}
        for slot in range(pool.slots):
            if waiting and slot not in playing:
                playing[slot], started[slot] = waiting.pop()
        if started:
            pool.reset(started)
        slots = sorted(playing)
        chunks = act(pool.observe(slots))
        for slot, (result, taken) in pool.step(dict(zip(slots, chunks, strict=True))).items():
            job = playing[slot]
            steps[job] += taken
            if result.done:
                outcomes[job] = Outcome(*jobs[job], result.success, result.score, steps[job])
                del playing[slot]
    return [outcomes[job] for job in range(len(jobs))]


class _Slot:
    """One place in a worker: one environment at a time, since each holds some 130 MB."""

    def __init__(self, images: NDArray[np.uint8]) -> None:
        self._images = images
        self._name = ""
        self._env: Environment | None = None
        self._fresh = True

    def reset(self, name: str, seed: int) -> str:
        if self._env is None or name != self._name:
            self.close()
            self._env, self._name = make(name), name
        self._fresh = True
        return self._env.reset(seed)

    def observe(self) -> tuple[NDArray[np.float32], str, bool]:
        seen = self._playing().observe()
        cameras = self._playing().spec.cameras
        self._images[:] = np.array([seen.images[c] for c in cameras], dtype=np.uint8)
        fresh, self._fresh = self._fresh, False
        return seen.state, seen.instruction, fresh

    def step(self, chunk: NDArray[np.float32]) -> tuple[StepResult, int]:
        if not len(chunk):
            raise ConfigError("An action chunk is empty; it must hold at least one step.")
        taken = 0
        for action in chunk:
            result = self._playing().step(action)
            taken += 1
            if result.done:
                break
        return result, taken

    def _playing(self) -> Environment:
        if self._env is None:
            raise ConfigError("A slot was observed or stepped before its first reset.")
        return self._env

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None


def _work(connection: Connection, shared: Any, shape: tuple[int, ...]) -> None:
    """A worker's life: answer until told to stop or the parent is gone. Ctrl-C is the parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    images = np.frombuffer(shared, np.uint8).reshape(shape)
    slots = {slot: _Slot(images[slot]) for slot in range(shape[0])}
    with suppress(EOFError, OSError):
        while request := connection.recv():
            method, share = request
            try:
                reply = {s: getattr(slots[s], method)(*arguments) for s, arguments in share.items()}
            except FoveateError as error:
                connection.send(error)
            except Exception as error:
                connection.send(SimulatorError(f"{method} failed: {type(error).__name__}: {error}"))
            else:
                connection.send(reply)
    for slot in slots.values():
        slot.close()
