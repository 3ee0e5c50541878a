"""The frozen values that cross a stage: Frame -> VisualTokens -> Plan -> Answer | ActionChunk
-> Step.

All are validated at birth, carry units in their names, and print shapes instead of contents.
`Plan` has a file of its own, plan.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import BudgetError, ValueShapeError


@dataclass(frozen=True, slots=True)
class Frame:
    """One decoded picture.

    image: uint8 [height, width, 3], RGB, upright.
    pts_s: presentation time in the source's own clock, seconds.
    index: position in the source's decoding order, 0-based.
    """

    image: NDArray[np.uint8]
    pts_s: float
    index: int

    def __post_init__(self) -> None:
        if self.image.dtype != np.uint8 or self.image.ndim != 3 or self.image.shape[2] != 3:
            raise ValueShapeError(
                f"Frame.image is {self.image.dtype} {self.image.shape}; "
                "it must be uint8 [height, width, 3]. Convert to RGB first."
            )

    def __repr__(self) -> str:
        height, width, _ = self.image.shape
        return f"Frame({width}x{height}, pts_s={self.pts_s:.3f}, index={self.index})"


@dataclass(frozen=True, slots=True)
class PatchGrid:
    """Geometry of a video's patches: `frames` grids of `rows` x `cols`, flat index (t, y, x)."""

    frames: int
    rows: int
    cols: int

    def __post_init__(self) -> None:
        if min(self.frames, self.rows, self.cols) < 1:
            raise ValueShapeError(f"{self} has an empty axis; every axis must be at least 1.")

    @property
    def per_frame(self) -> int:
        return self.rows * self.cols

    @property
    def size(self) -> int:
        return self.frames * self.per_frame


@dataclass(frozen=True, slots=True)
class VisualTokens:
    """Visual tokens on their way to (or inside) the language model.

    x: [n, d] features.
    index: long [n], flat (t, y, x) index of each token in `grid`.
    grid: the patch grid of the unreduced video.
    pts_s: presentation time of each frame of the grid, seconds.
    """

    x: Tensor
    index: Tensor
    grid: PatchGrid
    pts_s: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or self.index.shape != self.x.shape[:1]:
            raise ValueShapeError(
                f"VisualTokens.x is {tuple(self.x.shape)} and index {tuple(self.index.shape)}; "
                "they must be [n, d] and [n]."
            )
        if len(self.pts_s) != self.grid.frames:
            raise ValueShapeError(
                f"{len(self.pts_s)} presentation times for {self.grid.frames} frames; "
                "give one for each frame of the grid."
            )

    @classmethod
    def full(cls, x: Tensor, grid: PatchGrid, pts_s: tuple[float, ...]) -> VisualTokens:
        """All patches of a grid; x is [grid.size, d] in (t, y, x) order."""
        if x.shape[0] != grid.size:
            raise ValueShapeError(f"{x.shape[0]} tokens for {grid} with {grid.size} patches.")
        return cls(x, torch.arange(grid.size, device=x.device), grid, pts_s)

    @property
    def n(self) -> int:
        return self.x.shape[0]

    @property
    def is_full(self) -> bool:
        return self.n == self.grid.size

    @property
    def frame(self) -> Tensor:
        """long [n]: the frame each token comes from."""
        return self.index // self.grid.per_frame

    def __repr__(self) -> str:
        return f"VisualTokens(x={tuple(self.x.shape)}, {self.x.dtype}, {self.grid})"


@dataclass(frozen=True, slots=True)
class Budget:
    """How many visual tokens may leave a stage, always absolute.

    tokens: allowed count. deadline_ms: the time limit it was derived from, if any.
    """

    tokens: int
    deadline_ms: float | None = None

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise BudgetError(f"Budget.tokens is {self.tokens}; it must be 0 or more.")

    @classmethod
    def ratio(cls, retain: float, of: int) -> Budget:
        """The one place where a retain ratio becomes a count: round(retain * of), at least 1."""
        if not 0 < retain <= 1:
            raise BudgetError(f"The retain ratio is {retain}; it must be in (0, 1].")
        return cls(max(1, round(retain * of)))


@dataclass(frozen=True, slots=True)
class Segment:
    """Frames start..stop-1 that are reduced together."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueShapeError(f"{self} is empty or negative; 0 <= start < stop is needed.")

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Answer:
    """What a video LLM said. `confidence` is the mean probability of the generated tokens."""

    text: str
    token_ids: tuple[int, ...]
    confidence: float


@dataclass(frozen=True, slots=True)
class Observation:
    """What a robot sees and feels at one moment.

    images: uint8 [height, width, 3] RGB upright of each camera, in the policy's order; None where
        a camera gave nothing.
    state: float32 [s], proprioception in the environment's units.
    instruction: what the robot is told to do.
    time_s: when the pictures were taken, seconds in the episode's clock.
    """

    images: Mapping[str, NDArray[np.uint8] | None]
    state: NDArray[np.float32]
    instruction: str
    time_s: float

    def __post_init__(self) -> None:
        for camera, image in self.images.items():
            if image is not None and (
                image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3
            ):
                raise ValueShapeError(
                    f"Camera '{camera}' gave {image.dtype} {image.shape}; "
                    "it must be uint8 [height, width, 3], or None when it gave nothing."
                )
        if self.state.dtype != np.float32 or self.state.ndim != 1:
            raise ValueShapeError(
                f"Observation.state is {self.state.dtype} {self.state.shape}; "
                "it must be float32 [s]."
            )
        if not (np.isfinite(self.state).all() and np.isfinite(self.time_s)):
            raise ValueShapeError(
                "Observation.state or time_s holds NaN or infinite values; "
                "hold the robot until its sensors are back."
            )

    def __repr__(self) -> str:
        seen = {c: None if i is None else i.shape for c, i in self.images.items()}
        return f"Observation({seen}, state={self.state.shape}, time_s={self.time_s:.3f})"


@dataclass(frozen=True, slots=True)
class ActionChunk:
    """What a robot policy wants done.

    actions: float32 [steps, a], one row for each control period, in the environment's units.
    observed_s: `time_s` of the observation it was computed from.
    """

    actions: NDArray[np.float32]
    observed_s: float

    def __post_init__(self) -> None:
        if self.actions.dtype != np.float32 or self.actions.ndim != 2:
            raise ValueShapeError(
                f"ActionChunk.actions is {self.actions.dtype} {self.actions.shape}; "
                "it must be float32 [steps, a]."
            )
        if not np.isfinite(self.actions).all():
            raise ValueShapeError(
                "The policy gave NaN or infinite actions; they must never reach a robot. "
                "Run it in float32 to find where they come from."
            )

    def __repr__(self) -> str:
        return f"ActionChunk({self.actions.shape}, observed_s={self.observed_s:.3f})"


@dataclass(frozen=True, slots=True)
class Step:
    """One tick of a stream as a sink records it; every field is plain data."""

    tick: int
    first_pts_s: float
    last_pts_s: float
    tokens_in: int
    tokens_out: int
    budget_tokens: int
    timings_ms: dict[str, float] = field(default_factory=dict)
    output: dict[str, Any] = field(default_factory=dict)
