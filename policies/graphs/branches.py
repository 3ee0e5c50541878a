"""Work that does not depend on each other, side by side on one device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor


def at_once(device: torch.device, works: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    """What each work gives; on CUDA each has a stream of its own, also within a captured graph,
    unless gradients are wanted.

    Small kernels leave most of a GPU idle, so two encoders take little longer than the slower one.
    """
    if device.type != "cuda" or len(works) < 2 or torch.is_grad_enabled():
        return [work() for work in works]
    here = torch.cuda.current_stream(device)
    streams = [_stream(device, i) for i in range(len(works) - 1)]
    for stream in streams:
        stream.wait_stream(here)
    said = []
    try:
        for stream, work in zip(streams, works[1:], strict=True):
            with torch.cuda.stream(stream):
                said.append(work())
        said.insert(0, works[0]())
    finally:  # also where one of them failed: no capture ends well before all streams came back
        for stream in streams:
            here.wait_stream(stream)
    for value in said[1:]:
        value.record_stream(here)
    return said


@cache
def _stream(device: torch.device, index: int) -> Any:
    return torch.cuda.Stream(device)
