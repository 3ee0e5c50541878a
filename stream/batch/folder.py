"""The folder of a run: one writer at a time, the settings it was begun with, what is done.

settings.json   what decides the answers; a run goes on only with the same
journal/        finished videos, one shard for each start
results.jsonl   rows in the manifest's order, once all are done
errors.jsonl    rows without an answer, and why
summary.json    counts and costs
lmms_eval/      answers as lmms-eval replays them, for its datasets
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stream.errors import ConfigError

from .jobs import Outcome, VideoJob
from .journal import Journal, write_whole


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder against a second writer; a killed holder lets go by itself."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise ConfigError(f"{folder} cannot hold a run: {error.strerror}.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"Another run is writing to {folder}; wait for it, or give another folder."
            ) from None
        yield


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Note the settings of a new run; refuse to go on with others than it was begun with.

    A setting that an earlier version did not know is noted now.
    """
    path = folder / "settings.json"
    now = json.loads(json.dumps(settings))
    then = json.loads(path.read_text()) if path.exists() else {}
    changed = [k for k in sorted(then) if then[k] != now.get(k)]
    if changed:
        lines = "; ".join(f"{k} was {then.get(k)!r}, now {now.get(k)!r}" for k in changed)
        raise ConfigError(
            f"{folder} holds a run with other settings ({lines}). "
            "Give the same settings to go on with it, or another folder."
        )
    if then.keys() != now.keys():
        write_whole(path, json.dumps(now, indent=2) + "\n")


def pending(
    jobs: Sequence[VideoJob], done: Mapping[str, Outcome], retry_errors: bool
) -> list[VideoJob]:
    """The jobs that are still to do."""

    def is_done(job: VideoJob) -> bool:
        outcome = done.get(job.key)
        return outcome is not None and not (retry_errors and outcome.error)

    return [job for job in jobs if not is_done(job)]


def carry_out(
    folder: Path,
    jobs: Sequence[VideoJob],
    run: Callable[[Sequence[VideoJob]], Iterator[Outcome]],
    *,
    retry_errors: bool = False,
    on_begin: Callable[[Mapping[str, Outcome]], None] = lambda done: None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> dict[str, Outcome]:
    """Do what is not done yet; the outcomes of all jobs by key.

    run: does jobs in any order. on_begin: told what earlier starts finished.
    """
    journal = Journal(folder / "journal")
    done = journal.read()
    todo = pending(jobs, done, retry_errors)
    left = {job.key for job in todo}
    on_begin({job.key: done[job.key] for job in jobs if job.key not in left})
    if todo:
        (folder / "results.jsonl").unlink(missing_ok=True)
        with journal:
            for outcome in run(todo):
                journal.append(outcome)
                done[outcome.key] = outcome
                on_outcome(outcome)
    return {job.key: done[job.key] for job in jobs}
