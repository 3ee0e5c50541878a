"""Captured work that stands on a network: it goes when the network is another one."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .alone import Alone
from .capture import GraphPool
from .footing import Footing
from .kept import Kept, weakly


class Standing(ABC):
    """What captures parts of a network, for one call at a time.

    what: the network, as messages name it. roots: its modules, as they are now. pool: of what is
    captured; another one once the network changed.
    """

    def __init__(
        self, what: str, roots: Callable[[], Iterable[nn.Module]], device: torch.device
    ) -> None:
        self._what, self._device = what, device
        self._alone, self._footing = Alone(what), Footing(roots)
        self._warned = False
        self.pool = self._new_pool()

    @abstractmethod
    def _kept(self) -> list[Kept[Any, Any]]:
        """All that holds captured work."""

    def stand(self) -> None:
        """On the network as it is now."""
        self._rebuild()
        self._footing.note()  # joined weights have moved

    def _rebuild(self) -> None:  # noqa: B027
        """Make anew what is made of the network: nothing, if not stated otherwise."""

    def ready(self) -> bool:
        """Whether the next call may be made here; ask before each one.

        What stands on an older state of the network goes. Where the network has hooks or another
        forward, which a replay would leave out, or lies elsewhere, this warns once, and the network
        has to run as it stands. Costs about 0.3 us a parameter.
        """
        with self._alone:
            if not self._footing.holds():
                for kept in self._kept():
                    kept.clear()
                self.pool = self._new_pool()
                self.stand()
            if self._footing.is_plain and self._footing.devices == {self._device}:
                return True
            self.pool.uncaptured += self.pool.enabled
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._what} has hooks or another forward, or does not lie on {self._device}. "
                "A captured graph would leave them out, so its kernels are launched one by one.",
                stacklevel=2,
            )
        return False

    def _new_pool(self) -> GraphPool:
        return GraphPool(self._device, spare=weakly(self._spare))

    def _spare(self) -> None:
        for kept in self._kept():
            kept.spare()
