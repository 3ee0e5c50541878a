"""A tick as pictures and a line of text."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..ticks import Tick
from .patch_paint import Fates, Pixels, paint_frame


def painted(tick: Tick, side_px: int = 256) -> dict[str, Pixels | None]:
    """Each camera's picture with its kept patches: uint8 [about side_px, about side_px, 3].

    A picture that reached no prefix is shown as it is; None where the camera gave nothing.
    """
    if tick.observation is None:
        return {}
    fates = Fates.of(tick.plan, tick.grid) if tick.plan is not None and tick.grid else None
    out: dict[str, Pixels | None] = {}
    for camera, image in tick.observation.images.items():
        if image is None:
            out[camera] = None
        elif fates is not None and tick.grid is not None and camera in tick.cameras:
            cell = (max(4, side_px // tick.grid.cols), max(4, side_px // tick.grid.rows))
            out[camera] = paint_frame(image, tick.cameras.index(camera), fates, cell)
        else:
            out[camera] = np.asarray(Image.fromarray(image).resize((side_px, side_px)))
    return out


def caption(tick: Tick) -> str:
    """One line: time, tokens, what was promised, what it took, what was given up."""
    decision = tick.decision
    parts = [f"{tick.time_s:.2f} s", decision.rung.name.lower().replace("_", " ")]
    if decision.runs:
        parts.append(f"{decision.tokens} tokens")
    took = f"{tick.elapsed_ms:.0f} ms"
    parts.append(took if np.isinf(tick.deadline_ms) else f"{took} of {tick.deadline_ms:.0f}")
    if tick.late:
        parts.append("MISSED" if tick.missed else "late")
    if tick.held:
        parts.append(f"held {tick.held}")
    return "   ".join(parts)
