"""Programs of fixed shape, captured once as CUDA graphs that share one memory pool."""

from __future__ import annotations

import gc
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

Work = Callable[..., tuple[Tensor, ...]]
"""Reads its arguments and tensors of its own; returns what it made. Never asks the device back."""

WARMUP_RUNS = 2


class GraphPool:
    """The captured graphs of one device, and what they cost.

    enabled: capture on CUDA; else, and on other devices, the same work is launched eagerly.
    spare: called when memory runs out; its owner drops what it keeps and does not use now.
    patience: runs of each program that are launched as they stand before it may be captured.
    open: set it to False where nothing may be captured any more; what was not is launched eagerly.
    captured: graphs so far. fallen_back: reasons why some work could not be captured. uncaptured:
    runs of work without a graph, where graphs are wanted.
    warmup_s: seconds spent on warming up and capturing.
    """

    def __init__(
        self,
        device: torch.device | str,
        enabled: bool = True,
        spare: Callable[[], None] = lambda: None,
        patience: int = 0,
    ) -> None:
        self.device = torch.device(device)
        self.enabled = enabled and self.device.type == "cuda"
        self.open, self.patience = True, patience
        self.captured = self.uncaptured = 0
        self.fallen_back: list[str] = []
        self.warmup_s = 0.0
        self._spare = spare
        self._memory: Any = None
        self._sharing: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self._stream: Any = None

    def capture(self, name: str, work: Callable[[], None], reset: Callable[[], None]) -> Any:
        """A graph of `work`, warmed up; None, after one warning, where it cannot be captured.

        Where memory runs out, what is not in use is freed, and it is tried once more.

        reset: undoes what a run of `work`, or a part of one, changed.
        """
        start_s = time.perf_counter()
        try:
            made = self._attempt(work, reset)
            if _ran_out(made):
                self._spare()
                gc.collect()
                torch.cuda.empty_cache()
                made = self._attempt(work, reset)
        finally:
            self.warmup_s += time.perf_counter() - start_s
        if not isinstance(made, RuntimeError):
            self.captured += 1
            return made
        gc.collect()
        why = "out of memory while capturing." if _ran_out(made) else str(made).splitlines()[0]
        if not self.fallen_back:
            warnings.warn(
                f"{name}: {why} Its kernels are launched one by one instead of as a graph.",
                stacklevel=2,
            )
        self.fallen_back.append(f"{name}: {why}")
        return None

    def _attempt(self, work: Callable[[], None], reset: Callable[[], None]) -> Any:
        """A graph, or why there is none: an error that holds nothing of the attempt."""
        handled = sys.exception()
        try:
            return self._graph_of(work, reset)
        except RuntimeError as error:
            why = _cause(error, handled)
        self._settle()
        reset()
        return why

    def _graph_of(self, work: Callable[[], Any], reset: Callable[[], None]) -> Any:
        here = torch.cuda.current_stream(self.device)
        if not self._sharing:  # memory that no graph holds any more cannot be shared
            self._memory = torch.cuda.graph_pool_handle()
        self._stream = self._stream or torch.cuda.Stream(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(here):  # a capture that breaks off does not come back by itself
            self._stream.wait_stream(here)
            with torch.cuda.stream(self._stream):
                for _ in range(WARMUP_RUNS):
                    work()
                    reset()
            here.wait_stream(self._stream)
            with torch.cuda.graph(graph, pool=self._memory, stream=self._stream):
                work()
        self._sharing.add(graph)
        return graph

    def _settle(self) -> None:
        """Wait for what an attempt has launched, and end a capture that broke off."""
        torch.cuda.synchronize(self.device)
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        with suppress(RuntimeError):  # where it did not break off
            torch._C._cuda_endAllocateToPool(index, self._memory)
            torch._C._cuda_releasePool(index, self._memory)
            self._sharing.clear()
            # Random numbers are drawn as within the capture until another one ends well.
            self._graph_of(lambda: torch.zeros(1, device=self.device), lambda: None)


def _ran_out(made: Any) -> bool:
    """Whether an attempt ended for want of memory; the driver says so in a plain RuntimeError."""
    is_said = isinstance(made, RuntimeError) and "out of memory" in str(made)
    return is_said or isinstance(made, torch.cuda.OutOfMemoryError)


def _cause(error: RuntimeError, handled: BaseException | None) -> RuntimeError:
    """The first of the errors that led to this one, without the frames that it came through.

    handled: what the caller was handling before, which led to nothing.
    """
    cause, before = error, error.__context__
    while before is not None and before is not handled:
        cause = before if isinstance(before, RuntimeError) else cause
        before = before.__context__
    cause.__context__ = cause.__cause__ = None
    return cause.with_traceback(None)


class Program:
    """Work over tensors of fixed shape; call it with new values.

    On a capturing pool that is open the first call captures, or the first behind the runs that the
    pool's patience asks for; each call then copies the values into the graph's own inputs, replays
    it, and returns the graph's own outputs, which the next call overwrites.

    state: tensors that the work changes in place; warming up leaves them as they were.
    """

    def __init__(
        self, pool: GraphPool, name: str, work: Work, state: Sequence[Tensor] = ()
    ) -> None:
        self._pool, self._name, self._work, self._state = pool, name, work, tuple(state)
        self._graph: Any = None
        self._tried, self._runs = not pool.enabled, 0
        self._inputs: tuple[Tensor, ...] = ()
        self._outputs: tuple[Tensor, ...] = ()

    def __call__(self, *values: Tensor) -> tuple[Tensor, ...]:
        if not self._tried and self._pool.open and self._runs >= self._pool.patience:
            self._capture(values)
        self._runs += 1
        if self._graph is None:
            self._pool.uncaptured += self._pool.enabled
            return self._work(*values)
        for own, value in zip(self._inputs, values, strict=True):
            own.copy_(value)
        self._graph.replay()
        return self._outputs

    def _capture(self, values: tuple[Tensor, ...]) -> None:
        self._tried = True
        before: tuple[Tensor, ...] = ()
        inputs: tuple[Tensor, ...] = ()
        outputs: tuple[Tensor, ...] = ()

        def work() -> None:
            nonlocal before, inputs, outputs
            before = before or tuple(tensor.clone() for tensor in self._state)
            inputs = inputs or tuple(value.clone() for value in values)
            made = self._work(*inputs)
            outputs = outputs or tuple(torch.empty_like(value) for value in made)
            for own, value in zip(outputs, made, strict=True):
                own.copy_(value)

        def reset() -> None:
            # What was not noted before memory ran out was not changed either.
            for tensor, value in zip(self._state, before, strict=False):
                tensor.copy_(value)

        graph = self._pool.capture(self._name, work, reset)
        reset()
        if graph is not None:
            self._graph, self._inputs, self._outputs = graph, inputs, outputs
