"""What one stream remembers between ticks; owned by the pipeline, never by a reducer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(slots=True)
class Memory:
    """State of one stream.

    seed: base of every random choice made for this stream.
    tick: how many times the stream was reduced; the pipeline advances it.
    state: whatever reducers keep, by their own names.
    """

    seed: int = 0
    tick: int = 0
    state: dict[str, Any] = field(default_factory=dict)

    def generator(self) -> torch.Generator:
        """A CPU generator that depends on seed and tick alone."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.tick)

    def reset(self) -> None:
        """Forget the stream, keep the seed."""
        self.tick = 0
        self.state.clear()
