"""What every sink of a robot's ticks does."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from ..closing import Closing
from ..ticks import Tick


class TickSink(Closing):
    """Takes episodes tick by tick.

    needs_film: whether it wants `Tick.seen`, an observation before every control period.
    """

    needs_film = False

    @abstractmethod
    def begin(self, about: Mapping[str, Any]) -> None:
        """An episode begins; `about` says of what, as plain data."""

    @abstractmethod
    def write(self, tick: Tick) -> None: ...

    @abstractmethod
    def end(self, summary: Mapping[str, Any]) -> None:
        """The episode is over; `summary` says how it went, as plain data."""
