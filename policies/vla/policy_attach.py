"""A policy of this package in an episode, pruned: an observation in, actions out."""

from __future__ import annotations

from typing import Self

from stream.data import ActionChunk, Budget, Observation
from stream.errors import BudgetError
from stream.memory import Memory
from stream.plan import Plan
from stream.reducers.base import Reducer
from stream.reducers.vla_pruner import begin_episode

from .base import VLAPolicy


class PolicyAttachment:
    """A pruned policy that remembers its episode. The policy it was made of stays as it is.

    policy: the pruned one, for its three phases apart. plan: what became of the visual tokens in
    the last inference.

    An inference holds the episode it began in: after a `reset` in its middle, by another thread,
    what it saw goes to the old one.
    """

    def __init__(
        self,
        policy: VLAPolicy,
        reducer: Reducer,
        retain: float | None,
        budget: int | None,
        seed: int,
    ) -> None:
        if (retain is None) == (budget is None):
            raise BudgetError(
                f"retain is {retain} and budget is {budget}; give exactly one of them."
            )
        self.policy = policy.pruned_by(reducer)
        self.plan: Plan | None = None
        self._budget, self._retain, self._seed = budget, retain, seed
        self._epoch = -1
        self.reset()

    def reset(self) -> None:
        """Begin an episode."""
        memory = Memory(self._seed)
        self._epoch += 1
        begin_episode(memory, self._epoch)
        self._episode = memory, self._epoch

    def act(self, observation: Observation, steps: int | None = None, seed: int = 0) -> ActionChunk:
        """See, reduce, act and remember. steps, seed: of flow policies."""
        memory, epoch = self._episode
        scene = self.policy.encode(observation)
        n = scene.x.shape[0]
        budget = Budget.ratio(self._retain, of=n) if self._retain else Budget(self._budget or 0)
        prefix = self.policy.prefill(scene, budget, memory, epoch)
        chunk, attention = self.policy.act(prefix, observation, steps, seed)
        self.policy.remember(prefix, attention, memory)
        self.plan = prefix.plan
        return chunk

    def detach(self) -> None:
        """Nothing of it stays in the policy between calls."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()
