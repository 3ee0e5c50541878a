"""Workers over Ray: a death counts against the video at hand, and never ends a run."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from stream.batch.jobs import Outcome, VideoJob
from stream.batch.pool import RETRIES, Place, run_pool
from stream.batch.worker import VideoWorker
from stream.errors import ConfigError, FoveateError

pytestmark = pytest.mark.usefixtures("one_ray")


class Fragile(VideoWorker):
    """A worker without a model, whose process dies on a video of the right name."""

    def __init__(self) -> None: ...

    def run(self, job: VideoJob) -> Outcome:
        if job.path == "poison":
            os._exit(1)
        return Outcome(job.key, answers=(("well", 1.0),))


def test_a_video_that_kills_its_workers_is_given_up_and_only_that() -> None:
    jobs = [VideoJob(name, ("q?",)) for name in ("a", "poison", *"bcdef")]
    said: list[str] = []
    started: list[int] = []
    outcomes = list(run_pool(jobs, Fragile, Place(), on_start=started.append, say=said.append))
    done = {o.key: o for o in outcomes}
    assert len(outcomes) == len(done) == len(jobs)
    assert [j.path for j in jobs if done[j.key].error] == ["poison"]
    assert done[jobs[1].key].fault == "worker"
    assert sum("died on poison" in text for text in said) == RETRIES + 1
    assert len(started) == RETRIES + 1


def no_model() -> VideoWorker:
    raise ConfigError("no such reducer")


def dying_model() -> VideoWorker:
    os._exit(1)


@pytest.mark.parametrize(("make", "says"), [(no_model, "no such"), (dying_model, "3 workers in a")])
def test_a_model_that_does_not_load_ends_the_run(
    make: Callable[[], VideoWorker], says: str
) -> None:
    with pytest.raises(FoveateError, match=says):
        list(run_pool([VideoJob("a", ("q?",))], make, Place()))
