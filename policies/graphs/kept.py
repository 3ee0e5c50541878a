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

    def get(self, key: Key, make: Callable[[], Value], size: int = 0) -> Value:
        """The value of `key`, which is made where there is none; others go before."""
        if key not in self._values:
            while self._values and (
                len(self._values) >= self._most or sum(self._sizes.values()) + size > self._room
            ):
                gone, _ = self._values.popitem(last=False)
                del self._sizes[gone]
            self._values[key] = make()
            self._sizes[key] = size
        self._values.move_to_end(key)
        return self._values[key]

    def clear(self) -> None:
        self._values.clear()
        self._sizes.clear()

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
