"""What is kept of captured work, without holding the memory of what is not."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any
from weakref import WeakMethod


class Kept[Key: Hashable, Value]:
    """Values by key, `most` of them, with `room` for their sizes together, or for one alone; the
    one that was not used for the longest time goes.

    What goes gives its memory back at once if nobody else holds it and it does not hold itself: see
    `weakly`.
    """

    def __init__(self, most: int, room: float = math.inf) -> None:
        self._most, self._room = most, room
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self._sizes: dict[Key, int] = {}
        self._spared: set[Key] = set()
        self._missed = False

    def get(self, key: Key, make: Callable[[], Value], size: int = 0) -> Value:
        """The value of `key`, which is made where there is none; others go before."""
        if key not in self._values:
            while self._values and (
                len(self._values) >= self._most or sum(self._sizes.values()) + size > self._room
            ):
                self._drop(next(iter(self._values)))
            self._missed |= key in self._spared
            self._values[key] = make()
            self._sizes[key] = size
        self._values.move_to_end(key)
        return self._values[key]

    def spare(self) -> None:
        """What is not in use goes: all but the value that was used last.

        Once something that went so was wanted again nothing does any more: there is no room for
        all, and making them in turns takes longer than doing without.
        """
        if not self._missed:
            for key in list(self._values)[:-1]:
                self._drop(key)
                self._spared.add(key)

    def clear(self) -> None:
        self._values.clear()
        self._sizes.clear()
        self._spared.clear()
        self._missed = False

    def _drop(self, key: Key) -> None:
        del self._values[key], self._sizes[key]

    def values(self) -> list[Value]:
        """The one that goes next comes first."""
        return list(self._values.values())

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._values)


def weakly(method: Callable[..., Any], *given: Any) -> Callable[..., Any]:
    """A bound method with its first arguments, which does not hold what it is bound to.

    So an object may keep programs of its own methods and still go, with its memory, when the last
    one who holds it lets go of it.
    """
    bound = WeakMethod(method)

    def call(*values: Any) -> Any:
        now = bound()
        assert now is not None
        return now(*given, *values)

    return call
