"""`Tick`: one decision of a robot policy and what came of it, as sinks take it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .budgets.decision import Decision, Rung
from .data import ActionChunk, Observation, PatchGrid
from .plan import Plan

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Tick:
    """From one observation to the next.

    number: in the episode, 0-based. epoch: of the episode. first_step: control period in which it
        was observed.
    observation: None where the sensors gave nothing usable; `said` tells why.
    cameras, grid, plan: of the prefix the actions came from, an old one where it was used again;
        empty or None where there was none.
    deadline_ms: from the observation to the end of what was promised; its rule.
    decision: the last one, after the prefill where that ran.
    promised: whether the first one promised a result by the deadline; predicted_ms: from the
        observation to the result as it foresaw, None where nothing foresees.
    stage_ms, elapsed_ms: time of each stage, and from the observation to the result, on the clock
        of the episode.
    late: the result came after the deadline. got: what the robot did at the deadline.
    chunk: what the policy wants; skipped: actions of it that were past when it came.
    executed: float32 [m, a], one action for each control period until the next observation.
    held: how many of them are holds.
    attention: float32 [grid.size], what the actions looked at; None where nothing was.
    seen: what was observed before each executed action, where a sink asked for it; None where the
        sensors gave nothing usable.
    said: what went wrong, in words.
    """

    number: int
    epoch: int
    first_step: int
    time_s: float
    instruction: str
    observation: Observation | None
    cameras: tuple[str, ...]
    grid: PatchGrid | None
    plan: Plan | None
    deadline_ms: float
    rule: str
    decision: Decision
    promised: bool
    predicted_ms: float | None
    stage_ms: Mapping[str, float]
    elapsed_ms: float
    late: bool
    got: Rung
    chunk: ActionChunk | None
    skipped: int
    executed: Floats
    held: int
    attention: Tensor | None
    seen: tuple[Observation | None, ...]
    said: tuple[str, ...]
    success: bool
    score: float

    @property
    def missed(self) -> bool:
        """The result was promised in time and came late or not at all."""
        return self.promised and self.late

    def to_record(self) -> dict[str, Any]:
        """Plain data for a JSON line; pictures and attention maps are left out."""
        decision = asdict(self.decision)
        decision["rung"] = self.decision.rung.name
        decision["if_late"] = self.decision.if_late.name
        return {
            "tick": self.number,
            "epoch": self.epoch,
            "step": self.first_step,
            "time_s": self.time_s,
            "instruction": self.instruction,
            "state": None if self.observation is None else self.observation.state.tolist(),
            "cameras": list(self.cameras),
            "grid": None if self.grid is None else [self.grid.rows, self.grid.cols],
            "plan": None if self.plan is None else self.plan.to("cpu").to_record(),
            "deadline_ms": _finite(self.deadline_ms),
            "rule": self.rule,
            "predicted_ms": self.predicted_ms,
            "decision": {k: _finite(v) for k, v in decision.items()},
            "stage_ms": {s: round(ms, 4) for s, ms in self.stage_ms.items()},
            "elapsed_ms": round(self.elapsed_ms, 4),
            "late": self.late,
            "missed": self.missed,
            "got": self.got.name,
            "actions": None if self.chunk is None else self.chunk.actions.tolist(),
            "skipped": self.skipped,
            "executed": self.executed.tolist(),
            "held": self.held,
            "attention": self._attention(),
            "said": list(self.said),
            "success": self.success,
            "score": self.score,
        }

    def _attention(self) -> dict[str, Any] | None:
        """Share of each camera, and of the tenth of places that received the most."""
        if self.attention is None or self.grid is None:
            return None
        attention = self.attention.float().cpu()
        total = max(float(attention.sum()), 1e-12)
        by_camera = attention.view(self.grid.frames, -1).sum(-1) / total
        top = attention.topk(max(1, attention.numel() // 10)).values.sum() / total
        shares = zip(self.cameras, by_camera.tolist(), strict=True)
        return {
            "by_camera": {camera: round(share, 4) for camera, share in shares},
            "top_tenth": round(float(top), 4),
        }


def _finite(value: Any) -> Any:
    """JSON has no infinity: a missing limit is null."""
    return None if isinstance(value, float) and not np.isfinite(value) else value
