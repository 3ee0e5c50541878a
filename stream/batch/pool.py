"""Workers over Ray: one actor each, one video at a time, the queue held by the driver.

Not Ray Data: its tasks are bound to an actor, and their retries run out within seconds while that
actor's node is gone, so rows that did no harm are dropped; with retries without end, a video that
kills its worker is never given up. Here the driver owns every job until its outcome is there, and
a death counts only against the video that the worker held.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from stream.actors import local_ray  # isort: skip  (sets Ray's environment before its import)

import ray

from stream.errors import FoveateError

from .jobs import Outcome, VideoJob
from .worker import VideoWorker

RETRIES = 2
"""How often a video is tried again after its worker died."""

START_FAILURES = 3
"""Workers in a row that die before they are ready; then the run gives up."""

PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where workers run.

    cpus, gpus: what Ray reserves for each worker. address: of a running cluster; None starts
    one on this machine, whatever an earlier one that was killed left behind.
    """

    workers: int = 1
    cpus: float = 1
    gpus: float = 0
    address: str | None = None


class WorkerActor:
    """A worker in a process of its own."""

    def __init__(self, make: Callable[[], VideoWorker]) -> None:
        self._make = make
        self._worker: VideoWorker | None = None

    def start(self) -> int:
        """Load the model; the process id."""
        self._worker = self._make()
        return os.getpid()

    def run(self, job: VideoJob) -> Outcome:
        assert self._worker is not None
        return self._worker.run(job)


def run_pool(
    jobs: Iterable[VideoJob],
    make: Callable[[], VideoWorker],
    place: Place,
    *,
    on_start: Callable[[int], None] = lambda pid: None,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Outcome]:
    """Outcomes as they come, one for each job whatever dies.

    make: builds a worker inside its actor; an error it raises ends the run.
    on_start: told the process id of each worker that is ready. say: told what a person should know.
    """
    with local_ray(place.address or "local"):
        pool = _Pool(deque(jobs), make, place, on_start, say)
        try:
            yield from pool.run()
        finally:
            pool.close()


class _Pool:
    def __init__(
        self,
        queue: deque[VideoJob],
        make: Callable[[], VideoWorker],
        place: Place,
        on_start: Callable[[int], None],
        say: Callable[[str], None],
    ) -> None:
        self._queue = queue
        self._make = make
        self._place = place
        self._on_start = on_start
        self._say = say
        self._starting: dict[Any, Any] = {}
        self._busy: dict[Any, tuple[Any, VideoJob]] = {}
        self._idle: list[Any] = []
        self._deaths: Counter[str] = Counter()
        self._failed_starts = 0

    def run(self) -> Iterator[Outcome]:
        while self._queue or self._busy:
            self._hand_out()
            done, _ = ray.wait([*self._busy, *self._starting], timeout=PATIENCE_S)
            if not done and not self._busy:
                self._say(self._waiting())
            for ref in done:
                if ref in self._starting:
                    self._started(ref, self._starting.pop(ref))
                elif outcome := self._finished(ref, *self._busy.pop(ref)):
                    self._hand_out()
                    yield outcome

    def close(self) -> None:
        for actor in [*self._idle, *self._starting.values(), *(a for a, _ in self._busy.values())]:
            ray.kill(actor)

    def _hand_out(self) -> None:
        """Jobs to idle workers; new workers while there is more work than workers."""
        while self._queue and self._idle:
            actor, job = self._idle.pop(), self._queue.popleft()
            self._busy[actor.run.remote(job)] = (actor, job)
        wanted = min(self._place.workers, len(self._queue) + len(self._busy))
        for _ in range(wanted - len(self._starting) - len(self._busy) - len(self._idle)):
            remote = ray.remote(
                num_cpus=self._place.cpus,
                num_gpus=self._place.gpus,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy="SPREAD",
            )(WorkerActor)
            started: Any = remote.remote(self._make)
            self._starting[started.start.remote()] = started

    def _started(self, ref: Any, actor: Any) -> None:
        try:
            pid = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, FoveateError):
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:
            self._failed_starts += 1
            self._say(f"a worker died while it loaded the model: {_first_line(error)}")
            if self._failed_starts >= START_FAILURES:
                raise FoveateError(
                    f"{START_FAILURES} workers in a row died while they loaded the model; is there "
                    f"memory enough for {self._place.workers} of them? {_first_line(error)}"
                ) from error
            return
        self._failed_starts = 0
        self._on_start(pid)
        self._idle.append(actor)

    def _finished(self, ref: Any, actor: Any, job: VideoJob) -> Outcome | None:
        """The outcome of a job; None when its worker died and it will be tried again."""
        try:
            outcome: Outcome = ray.get(ref)
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as error:
            ray.kill(actor)
            self._deaths[job.key] += 1
            self._say(f"a worker died on {job.path}: {_first_line(error)}")
            if self._deaths[job.key] <= RETRIES:
                self._queue.append(job)
                return None
            return Outcome(
                job.key,
                error=f"{RETRIES + 1} workers in a row died on this video (out of memory, a crash)",
                fault="worker",
            )
        self._idle.append(actor)
        return outcome

    def _waiting(self) -> str:
        free = ray.available_resources()  # type: ignore[no-untyped-call]
        return (
            f"no worker is ready yet: models load, or there is no room for a worker of "
            f"{self._place.cpus:g} CPUs and {self._place.gpus:g} GPUs (free are "
            f"{free.get('CPU', 0):g} and {free.get('GPU', 0):g})"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
