"""What every sink of a robot's ticks does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from ..ticks import Tick


class TickSink(ABC):
    """Takes episodes tick by tick. Use it in a `with` block, or close it.

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

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
