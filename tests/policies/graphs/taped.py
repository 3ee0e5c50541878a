"""A capture that needs no GPU: the operators of a run are noted, and run again on the same memory.

As with a CUDA graph, Python is not asked again: what it decided in the captured run stays so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from policies.graphs.capture import WARMUP_RUNS, GraphPool


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self._calls:
            again = func(*args, **kwargs)
            for mine, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(mine, Tensor) and mine.data_ptr() != new.data_ptr():
                    mine.copy_(new)


class TapedPool(GraphPool):
    def __init__(self, device: Any, **options: Any) -> None:
        super().__init__(device, **options)
        self.enabled = True

    def _graph_of(self, work: Callable[[], None], reset: Callable[[], None]) -> Any:
        for _ in range(WARMUP_RUNS):
            work()
            reset()
        tape = Tape()
        with tape:
            work()
        return tape

    def _settle(self) -> None:
        pass


class ScarcePool(TapedPool):
    """Has room for some graphs; memory runs out in the middle of making another."""

    def __init__(self, device: Any, room: int, **options: Any) -> None:
        super().__init__(device, **options)
        self.room, self._living = room, WeakSet[Tape]()

    def _graph_of(self, work: Callable[[], None], reset: Callable[[], None]) -> Any:
        if len(self._living) >= self.room:
            work()
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        tape = super()._graph_of(work, reset)
        self._living.add(tape)
        return tape
