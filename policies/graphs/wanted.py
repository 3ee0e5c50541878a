"""The setting that decides whether a model runs in fixed shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Capture = Literal["auto", "on", "off"]
"""Whether a model runs in fixed shapes, which a GPU replays as captured graphs: `auto` on CUDA,
`on` everywhere (a CPU runs the same programs as they stand), `off` nowhere."""


def wanted(capture: Capture, device: torch.device) -> bool:
    return capture == "on" or (capture == "auto" and device.type == "cuda")
