"""The one interface behind which every token-reduction method stands."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from ..data import Budget, VisualTokens
from ..errors import BudgetError, ConfigError
from ..memory import Memory
from ..plan import Plan
from ..signals import Signal, Signals


@dataclass(frozen=True, slots=True)
class Site:
    """Where a reducer acts.

    layer: None = before the language model (INPUT); an int = at the entry of that decoder layer;
        a float in (0, 1) = at that share of the model's depth.
    """

    layer: int | float | None = None

    @property
    def in_llm(self) -> bool:
        return self.layer is not None

    def layer_index(self, depth: int) -> int:
        """The decoder layer at whose entry tokens are reduced, for a model of `depth` layers."""
        if self.layer is None:
            raise ConfigError("A reducer before the language model has no layer.")
        index = self.layer if isinstance(self.layer, int) else round(self.layer * depth)
        if not 1 <= index < depth:
            raise ConfigError(
                f"The reducer acts at layer {index}, the model has layers 0..{depth - 1}; "
                f"allowed is 1..{depth - 1}, since the layer before gives the scores."
            )
        return index

    def __str__(self) -> str:
        if self.layer is None:
            return "input"
        if isinstance(self.layer, int):
            return f"layer {self.layer}"
        return f"layer at {self.layer:.2f} of depth"


INPUT = Site()


class Reducer(BaseModel, ABC):
    """Decides which visual tokens leave a stage. Frozen and stateless: fields are settings.

    Class attributes: `needs`, the signals `plan` may read; `source`, the publication; `reuses`,
    True if tokens that a plan drops stay in the model with the keys and values of the tick before.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    needs: ClassVar[frozenset[Signal]] = frozenset()
    source: ClassVar[str] = ""
    reuses: ClassVar[bool] = False

    @classmethod
    def build(cls, **settings: Any) -> Self:
        """Construct from user input; ConfigError instead of pydantic's."""
        try:
            return cls(**settings)
        except ValidationError as error:
            lines = "; ".join(
                f"{'.'.join(map(str, e['loc']))}: {e['msg']} (given {e['input']!r})"
                for e in error.errors()
            )
            raise ConfigError(
                f"{cls.__name__} cannot be built: {lines}. "
                f"Settings: {', '.join(cls.model_fields) or 'none'}."
            ) from error

    @property
    def site(self) -> Site:
        return INPUT

    @property
    def stages(self) -> tuple[Reducer, ...]:
        """This reducer and those that follow it deeper in the model, in order."""
        return (self,)

    def keeps(self, n: int, budget: Budget) -> int:
        """How many of n incoming tokens leave this stage."""
        return min(n, budget.tokens)

    def require_whole_frames(self, tokens: VisualTokens) -> None:
        """Raise ConfigError unless every patch of the grid has its token."""
        if not tokens.is_full:
            raise ConfigError(
                f"{type(self).__name__} reads whole frames, but got {tokens.n} of "
                f"{tokens.grid.size} patches; let it be the first reducer before the model."
            )

    def action_layers(self, depth: int) -> range:
        """The decoder layers, of `depth`, whose action attention the method wants to remember."""
        return range(0)

    @abstractmethod
    def plan(self, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory) -> Plan:
        """Decide what becomes of every token.

        tokens: features [n, d] at this reducer's site, with their places in the patch grid.
        budget: the plan has exactly min(budget.tokens, n) rows.
        memory: the stream's own; the only state a reducer may keep.
        """

    def plan_batch(
        self,
        tokens: Sequence[VisualTokens],
        signals: Sequence[Signals],
        budget: Budget,
        memories: Sequence[Memory],
    ) -> list[Plan]:
        """`plan` of several streams with as many tokens each; see `BatchReducer`."""
        each = zip(tokens, signals, memories, strict=True)
        return [self.plan(t, s, budget, memory) for t, s, memory in each]

    def is_ready(self, memory: Memory) -> bool:
        """Whether this stream's next plan meets the budget; false while a method warms up."""
        return True


class BatchReducer(Reducer):
    """A reducer of many small steps, each taken for all streams at once; `plan` is its batch of
    one."""

    def plan(self, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory) -> Plan:
        return self.plan_batch([tokens], [signals], budget, [memory])[0]

    @abstractmethod
    def plan_batch(
        self,
        tokens: Sequence[VisualTokens],
        signals: Sequence[Signals],
        budget: Budget,
        memories: Sequence[Memory],
    ) -> list[Plan]:
        """See `Reducer.plan_batch`."""


def reduce_batch(
    reducer: Reducer,
    tokens: Sequence[VisualTokens],
    signals: Sequence[Signals],
    budgets: Sequence[Budget],
    memories: Sequence[Memory],
) -> list[Plan]:
    """Run one stage for several streams: count, declared signals only, identity when all fit.

    Streams of one grid with as many tokens and as large budgets go through the reducer together.
    """
    kinds = {(t.grid, t.n, budget) for t, budget in zip(tokens, budgets, strict=True)}
    if len(kinds) != 1:
        each = zip(tokens, signals, budgets, memories, strict=True)
        return [reduce_stage(reducer, *one) for one in each]
    ((_, n, budget),) = kinds
    k = reducer.keeps(n, budget)
    if k >= n:
        return [Plan.identity(n, t.x.device) for t in tokens]
    if k < 1 and not reducer.site.in_llm:
        raise BudgetError(
            "0 visual tokens were asked for before the language model; at least 1 must reach it. "
            "Raise the budget, or drop the rest later with a reducer inside the model."
        )
    declared = [s.declared_by(reducer.needs) for s in signals]
    return reducer.plan_batch(tokens, declared, Budget(k, budget.deadline_ms), memories)


def reduce_stage(
    reducer: Reducer, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory
) -> Plan:
    """`reduce_batch` of one stream."""
    return reduce_batch(reducer, [tokens], [signals], [budget], [memory])[0]
