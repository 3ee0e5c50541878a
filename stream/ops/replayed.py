"""Arithmetic in fixed shapes, which whoever runs a reducer may replay instead of launching it.

A choice among a few hundred tokens is a hundred small operators: on a GPU it takes ten times as
long to launch them as to run them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

from torch import Tensor

Work = Callable[..., tuple[Tensor, ...]]
Run = Callable[[Hashable, Work, Sequence[Tensor]], tuple[Tensor, ...]]

_run: ContextVar[Run | None] = ContextVar("run", default=None)


def replayable(key: Hashable, work: Work, *tensors: Tensor) -> tuple[Tensor, ...]:
    """What `work` makes of `tensors`, which are new ones.

    Calls of one key do the same with the values of tensors of the same shapes. Work asks a device
    for no value, and copies none to it.
    """
    run = _run.get()
    return work(*tensors) if run is None else run(key, partial(_as_it_stands, work), tensors)


@contextmanager
def replaying(run: Run) -> Iterator[None]:
    """While open, in this thread, `run` is given what `replayable` is."""
    token = _run.set(run)
    try:
        yield
    finally:
        _run.reset(token)


def _as_it_stands(work: Work, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Work that has replayable parts is replayed as a whole."""
    token = _run.set(None)
    try:
        return work(*tensors)
    finally:
        _run.reset(token)
