"""Controllers that know no latency, for the rows a deadline controller is compared with."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ..config import Config
from ..data import Budget
from .decision import Decision, Outcome, Rung, Situation

Positive = Annotated[int, Field(ge=1)]


class FixedController(Config):
    """The same number of tokens and steps at every tick, in time or not."""

    tokens: Positive
    steps: Positive = 1

    def start(self) -> int:
        return 0

    def reset(self, state: int) -> int:
        return state + 1

    def decide(self, state: int, situation: Situation) -> tuple[int, Decision]:
        available = self.tokens if situation.tokens is None else situation.tokens
        return state, _blind(state, situation, min(self.tokens, available), self.steps)

    def refine(self, state: int, decision: Decision, situation: Situation) -> Decision:
        return decision

    def observe(self, state: int, decision: Decision, outcome: Outcome) -> int:
        return state


class RatioController(Config):
    """The same share of the tokens there are at every tick, in time or not.

    of: tokens to take the share of when a situation does not say how many there are.
    """

    retain: Annotated[float, Field(gt=0, le=1)]
    of: Positive
    steps: Positive = 1

    def start(self) -> int:
        return 0

    def reset(self, state: int) -> int:
        return state + 1

    def decide(self, state: int, situation: Situation) -> tuple[int, Decision]:
        available = self.of if situation.tokens is None else situation.tokens
        tokens = Budget.ratio(self.retain, available).tokens
        return state, _blind(state, situation, tokens, self.steps)

    def refine(self, state: int, decision: Decision, situation: Situation) -> Decision:
        return decision

    def observe(self, state: int, decision: Decision, outcome: Outcome) -> int:
        return state


def _blind(epoch: int, situation: Situation, tokens: int, steps: int) -> Decision:
    """The decision of a controller that does not look at the time; no frame, nothing to compute."""
    sees = situation.has_frame
    return Decision(
        rung=Rung.FULL if sees else situation.cover,
        tokens=tokens if sees else 0,
        steps=steps if sees else 0,
        predicted_ms=None,
        slack_ms=situation.slack_ms,
        point="encode",
        late=False,
        if_late=situation.cover,
        floor_broken=False,
        gave_up=(),
        why="the setting is fixed" if sees else "there is no new frame",
        source="",
        epoch=epoch,
    )
