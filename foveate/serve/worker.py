"""The one thread that touches the model: requests come first, attached cameras in between."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

_IDLE_S = 0.02
_LOG = logging.getLogger("foveate.serve")


class Worker:
    """turn: what is done between requests and while there are none; True if there is more of it
    to come soon."""

    def __init__(self, turn: Callable[[], bool]) -> None:
        self._turn = turn
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit[R](self, work: Callable[[], R]) -> Future[R]:
        """Done in the order of submission; one that is cancelled before its turn is left out."""
        future: Future[R] = Future()
        self._jobs.put((future, work))
        return future

    def close(self, patience_s: float) -> None:
        """Do what is submitted, then end."""
        self._jobs.put(None)
        self._thread.join(patience_s)

    def _run(self) -> None:
        busy = False
        while True:
            try:
                job = self._jobs.get(timeout=_IDLE_S if busy else 1.0)
            except queue.Empty:
                pass
            else:
                if job is None:
                    return
                _finish(*job)
            try:
                busy = self._turn()
            except Exception:
                _LOG.exception("a turn of the attached streams failed")


def _finish(future: Future[Any], work: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
