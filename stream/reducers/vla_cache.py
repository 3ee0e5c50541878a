"""VLA-Cache: compute anew what changed or mattered, take the rest from the tick before."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..data import Budget, VisualTokens
from ..memory import Memory
from ..ops import picks
from ..ops.history import AttentionHistory
from ..plan import Plan
from ..signals import Signals
from .base import Reducer
from .vla_pruner import STATE as ACTIONS

STATE = "vla_cache"
"""In `Memory.state`: what each token looked like when it was computed, float32 [n, d]."""


class VLACache(Reducer):
    """Computes the budget's tokens anew; the others keep the keys and values they had.

    Computed are the tokens that the last actions looked at most, then those that changed most. On
    the first tick, and when other cameras are there, all are.

    What differs from the paper: change is measured on the tokens as they enter the language model,
    not on pixels, and against the tick in which a token was last computed, so that slow drift adds
    up until it is seen; what matters is the attention of the last step's actions, not of its text
    rows; all layers reuse the same tokens; and the budget says how many are computed, where the
    paper lets a threshold decide.

    relevant: share of the budget for what the actions looked at; the rest goes to what changed.
    """

    source: ClassVar[str] = "arXiv 2502.02175, reconstructed"
    reuses: ClassVar[bool] = True

    relevant: float = Field(default=0.5, ge=0, le=1)

    @property
    def counts(self) -> Literal["published"]:
        """While there is nothing to reuse, `plan` keeps all tokens, whatever `keeps` says."""
        return "published"

    def action_layers(self, depth: int) -> range:
        return range(depth // 2, depth)

    def is_ready(self, memory: Memory) -> bool:
        return STATE in memory.state

    def plan(self, tokens: VisualTokens, signals: Signals, budget: Budget, memory: Memory) -> Plan:
        x = tokens.x.detach().float()
        computed: Tensor | None = memory.state.get(STATE)
        if computed is None or computed.shape != x.shape:
            memory.state[STATE] = x
            return Plan.identity(tokens.n, x.device)
        change = 1.0 - F.cosine_similarity(x, computed, dim=-1)
        looked_at = self._looked_at(tokens, memory, round(self.relevant * budget.tokens))
        anew = picks.top(change.masked_fill(looked_at, torch.inf), budget.tokens)
        memory.state[STATE] = computed.index_copy(0, anew, x[anew])
        return Plan.keep(anew, tokens.n)

    def _looked_at(self, tokens: VisualTokens, memory: Memory, k: int) -> Tensor:
        """bool [n]: the k tokens that the last step's actions looked at most; none if unknown."""
        history: AttentionHistory | None = memory.state.get(ACTIONS)
        if history is None or not history.glances:
            return torch.zeros(tokens.n, dtype=torch.bool, device=tokens.x.device)
        score = history.glances[-1].value[tokens.index]
        return picks.top_mask(score[None], torch.tensor([k], device=score.device))[0]
