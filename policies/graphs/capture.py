"""Programs of fixed shape, captured once as CUDA graphs that share one memory pool."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Work = Callable[..., tuple[Tensor, ...]]
"""Reads its arguments and tensors of its own; returns what it made. Never asks the device back."""

WARMUP_RUNS = 2


class GraphPool:
    """The captured graphs of one device, and what they cost.

    enabled: capture on CUDA; else, and on other devices, the same work is launched eagerly.
    open: set it to False where nothing may be captured any more; what was not is launched eagerly.
    captured: graphs so far. fallen_back: reasons why some work could not be captured. uncaptured:
    runs of work without a graph, where graphs are wanted.
    warmup_s: seconds spent on warming up and capturing.
    """

    def __init__(self, device: torch.device | str, enabled: bool = True) -> None:
        self.device = torch.device(device)
        self.enabled = enabled and self.device.type == "cuda"
        self.open = True
        self.captured = self.uncaptured = 0
        self.fallen_back: list[str] = []
        self.warmup_s = 0.0
        self._memory: Any = None
        self._stream: Any = None

    def capture(
        self, name: str, work: Callable[[], None], reset: Callable[[], None]
    ) -> torch.cuda.CUDAGraph | None:
        """A graph of `work`, warmed up; None, after one warning, where it cannot be captured.

        reset: undoes what a run of `work` changed.
        """
        start_s = time.perf_counter()
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                for _ in range(WARMUP_RUNS):
                    work()
                    reset()
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
            with torch.cuda.graph(graph, pool=self._memory, stream=self._stream):
                work()
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = f"{name}: {str(error).splitlines()[0]}"
            if not self.fallen_back:
                warnings.warn(
                    f"{reason} Its kernels are launched one by one instead of as a graph.",
                    stacklevel=2,
                )
            self.fallen_back.append(reason)
            self._memory = None
            gc.collect()
            torch.cuda.synchronize(self.device)
            return None
        finally:
            self.warmup_s += time.perf_counter() - start_s
        self.captured += 1
        return graph


class Program:
    """Work over tensors of fixed shape; call it with new values.

    On a capturing pool the first call captures, while the pool is open; each call then copies the
    values into the graph's own inputs, replays it, and returns the graph's own outputs, which the
    next call overwrites.

    state: tensors that the work changes in place; warming up leaves them as they were.
    """

    def __init__(
        self, pool: GraphPool, name: str, work: Work, state: Sequence[Tensor] = ()
    ) -> None:
        self._pool, self._name, self._work, self._state = pool, name, work, tuple(state)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._tried = not pool.enabled
        self._inputs: tuple[Tensor, ...] = ()
        self._outputs: tuple[Tensor, ...] = ()

    def __call__(self, *values: Tensor) -> tuple[Tensor, ...]:
        if not self._tried and self._pool.open:
            self._capture(values)
        if self._graph is None:
            self._pool.uncaptured += self._pool.enabled
            return self._work(*values)
        for own, value in zip(self._inputs, values, strict=True):
            own.copy_(value)
        self._graph.replay()
        return self._outputs

    def _capture(self, values: tuple[Tensor, ...]) -> None:
        self._tried = True
        before = [tensor.clone() for tensor in self._state]
        inputs = tuple(value.clone() for value in values)
        outputs: list[Tensor] = []

        def work() -> None:
            made = self._work(*inputs)
            if not outputs:
                outputs.extend(torch.empty_like(value) for value in made)
            for own, value in zip(outputs, made, strict=True):
                own.copy_(value)

        def reset() -> None:
            for tensor, value in zip(self._state, before, strict=True):
                tensor.copy_(value)

        self._graph = self._pool.capture(self._name, work, reset)
        reset()
        if self._graph is not None:
            self._inputs, self._outputs = inputs, tuple(outputs)
