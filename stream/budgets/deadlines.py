"""Where a deadline comes from: a period the user states, or a queue of actions that runs dry.

Rules, first match first. All are times from the moment the observation was taken, less the guard;
a stated budget caps every one of them except COLD.

    rule      precondition                           deadline
    BUDGET    there is no queue                      budget_ms, or one control period
    COLD      no chunk has been computed yet         cold_ms, or the budget; none without either
    STARVED   the queue is empty                     one control period
    PROMISED  the policy was told an inference       min(promised steps, actions left) periods
              delay (real-time chunking)
    QUEUE     otherwise                              actions left, in periods

COLD may be generous because the robot still stands. PROMISED is stricter than the queue: a chunk
computed for a delay of d steps continues the d actions that are executed meanwhile, and joins
them with a jump when it comes later.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Self

from pydantic import Field, model_validator

from ..config import Config
from ..errors import ValueShapeError

PositiveTime = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Rule(Enum):
    BUDGET = "budget"
    COLD = "cold"
    STARVED = "starved"
    PROMISED = "promised"
    QUEUE = "queue"


@dataclass(frozen=True, slots=True)
class Deadline:
    """limit_ms: from the observation to the last moment a result is of use; the rule that set it.

    Infinite when nothing limits it.
    """

    limit_ms: float
    rule: Rule

    def slack_ms(self, elapsed_ms: float) -> float:
        """Time left, `elapsed_ms` after the observation; negative when the deadline has passed."""
        return self.limit_ms - elapsed_ms


@dataclass(frozen=True, slots=True)
class ActionQueue:
    """Actions not yet executed when the observation was taken.

    actions_left: how many; 0 before the first chunk and when the queue ran dry.
    started: whether any chunk has been computed in this episode.
    promised_steps: the inference delay the policy was told, in control steps; 0 when it was told
        none, as outside real-time chunking.
    """

    actions_left: int
    started: bool = True
    promised_steps: int = 0

    def __post_init__(self) -> None:
        if min(self.actions_left, self.promised_steps) < 0:
            raise ValueShapeError(f"{self} holds a negative count.")
        if self.actions_left and not self.started:
            raise ValueShapeError(f"{self} has actions left of a chunk that was never computed.")


class Deadlines(Config):
    """The user's side of the rules.

    budget_ms: time from observation to result; None leaves it to the queue or the period.
    dt_s: control period; needed with a queue.
    cold_ms: time for the first chunk of an episode.
    guard_ms: kept free at the end, for handing the action over.
    """

    budget_ms: PositiveTime | None = None
    dt_s: PositiveTime | None = None
    cold_ms: PositiveTime | None = None
    guard_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.budget_ms is None and self.dt_s is None:
            raise ValueError("budget_ms, dt_s or both must be given")
        return self

    def of(self, queue: ActionQueue | None = None) -> Deadline:
        """The deadline of an observation. Raises ValueShapeError for a queue without dt_s."""
        period_ms = None if self.dt_s is None else self.dt_s * 1000
        budget_ms = self.budget_ms or math.inf
        if queue is None:
            return Deadline((self.budget_ms or period_ms or math.inf) - self.guard_ms, Rule.BUDGET)
        if period_ms is None:
            raise ValueShapeError("An action queue needs the control period; set dt_s, in seconds.")
        if not queue.started:
            limit_ms = budget_ms if self.cold_ms is None else self.cold_ms
            return Deadline(limit_ms - self.guard_ms, Rule.COLD)
        if queue.actions_left == 0:
            rule, steps = Rule.STARVED, 1
        elif queue.promised_steps:
            rule, steps = Rule.PROMISED, min(queue.promised_steps, queue.actions_left)
        else:
            rule, steps = Rule.QUEUE, queue.actions_left
        queue_ms = steps * period_ms
        if budget_ms < queue_ms:
            rule, queue_ms = Rule.BUDGET, budget_ms
        return Deadline(queue_ms - self.guard_ms, rule)


def delay_steps(predicted_ms: float, dt_s: float) -> int:
    """The inference delay to promise to a real-time-chunking policy: control steps, rounded up.

    predicted_ms: high quantile of the whole inference, from the observation on; not a running
        maximum, which one cold start would spoil for ever.
    """
    if not (math.isfinite(predicted_ms) and predicted_ms >= 0 and dt_s > 0):
        raise ValueShapeError(f"{predicted_ms} ms in periods of {dt_s} s is no delay.")
    return math.ceil(predicted_ms / (dt_s * 1000) - 1e-9)
