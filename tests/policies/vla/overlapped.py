"""Calls that come in the middle of another one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from stream.errors import AttachError
from stream.plan import Plan
from stream.reducers.vla_pruner import VLAPruner


class Overlapped:
    """Lets another thread make some calls while VLA-Pruner selects for the next one."""

    def __init__(
        self, calls: Sequence[Callable[[], object]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._calls, self._met = calls, list[BaseException | None]()
        plan = VLAPruner.plan_batch

        def meanwhile(reducer: VLAPruner, *given: Any) -> list[Plan]:
            if not self._met:
                with ThreadPoolExecutor(1) as thread:
                    pending = [thread.submit(call) for call in calls]
                    self._met.extend(future.exception() for future in pending)
            return plan(reducer, *given)

        monkeypatch.setattr(VLAPruner, "plan_batch", meanwhile)

    def all_refused(self) -> None:
        """Checks that each call was refused, and is made now."""
        assert [type(error) for error in self._met] == [AttachError] * len(self._calls)
        for call in self._calls:
            call()
