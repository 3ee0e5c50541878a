"""A stopwatch for stages: device events where there is a GPU, the host's clock everywhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

HOST = "host"
"""The stage that holds a whole request by the host's clock, the device drained at its end."""


class StageClock:
    """Times the stages of one request after another.

    On CUDA a stage is what lies between two events on the stream, so stages add up to what the
    device took, and launching ahead is not punished; HOST holds what a caller waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def request(self) -> Iterator[dict[str, float]]:
        """Yields the milliseconds of each stage, filled in when the block ends."""
        self._events.clear()
        times_ms: dict[str, float] = {}
        self._drain()
        start_s = time.perf_counter()
        yield times_ms
        self._drain()
        times_ms[HOST] = (time.perf_counter() - start_s) * 1e3
        for stage, start, stop in self._events:
            ms = start.elapsed_time(stop) if self._on_gpu else (stop - start) * 1e3
            times_ms[stage] = times_ms.get(stage, 0.0) + ms

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self._events.append((name, start, self._now()))

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _drain(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
