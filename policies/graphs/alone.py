"""One call at a time: a second one is refused, not mixed into the first."""

from __future__ import annotations

from threading import Lock

from stream.errors import AttachError


class Alone:
    """A context manager for what shares buffers. Raises AttachError where a call is under way.

    what: has the buffers, as the error names it.
    """

    def __init__(self, what: str) -> None:
        self._what, self._lock = what, Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise AttachError(
                f"{self._what} is busy with another call, and its fixed shapes serve one at a "
                "time. Call it from one thread, or without capture."
            )

    def __exit__(self, *exc: object) -> None:
        self._lock.release()
