"""Replays of what reducers do in fixed shapes, see `stream.ops.replayed`."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from functools import partial

from torch import Tensor

from stream.ops.replayed import Work, replaying

from .capture import GraphPool, Program
from .kept import Kept

KEPT = 32
"""Programs that are kept; the one that was not used for the longest time goes."""


class Replays:
    """programs: by what they do and the shapes and types of what they take."""

    def __init__(self) -> None:
        self.programs: Kept[Hashable, Program] = Kept(KEPT)

    def on(self, pool: GraphPool) -> AbstractContextManager[None]:
        """While open, what is replayable is captured on a pool and replayed."""
        return replaying(partial(self._run, pool))

    def _run(
        self, pool: GraphPool, key: Hashable, work: Work, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        like = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        name = "What a reducer chooses"
        program = self.programs.get((key, like), lambda: Program(pool, name, work))
        return tuple(made.clone() for made in program(*tensors))
