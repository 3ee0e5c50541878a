"""Pruning on a user's own lerobot policy: its processors, its queue and its sampling stay."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor

from stream.data import Budget
from stream.errors import BudgetError
from stream.memory import Memory
from stream.plan import Plan
from stream.reducers.base import Reducer
from stream.reducers.vla_pruner import remember

from .flow import FlowPruning, Inference, Request, bound
from .flow_family import FlowFamily, Seen


@dataclass(slots=True)
class _Episode:
    """memories, last_s: one for each sequence of the batch. inferences: how many have begun."""

    number: int
    seed: int
    memories: list[Memory] = field(default_factory=list)
    last_s: list[float] = field(default_factory=list)
    inferences: int = 0

    def begin_inference(self, times_s: list[float]) -> tuple[Memory, ...]:
        """Memories for an inference at these times; time that runs backwards begins anew."""
        self.inferences += 1
        for i, time_s in enumerate(times_s):
            if i == len(self.memories):
                self.memories.append(Memory(self.seed + i))
                self.last_s.append(time_s)
            if time_s < self.last_s[i]:
                self.memories[i] = Memory(self.seed + i)
            self.last_s[i] = time_s
        return tuple(self.memories[: len(times_s)])


class FlowAttachment:
    """A reducer attached to a policy; use as a context manager or call `detach`.

    plans: what became of the visual tokens of each sequence in the last inference, over the grid
    of all cameras. lengths: tokens, text included, that entered each layer of its prefix.

    An episode ends with `policy.reset()`, also when another thread calls it in mid-inference: an
    inference holds the episode it began in, and what it saw goes there.
    """

    def __init__(
        self,
        family: FlowFamily,
        reducer: Reducer,
        retain: float | None,
        budget: int | None,
        seed: int,
        dt_s: float,
    ) -> None:
        if (retain is None) == (budget is None):
            raise BudgetError(
                f"retain is {retain} and budget is {budget}; give exactly one of them."
            )
        self._family = family
        self._retain, self._tokens, self._dt_s = retain, budget, dt_s
        self._pruning = FlowPruning(family, reducer)
        self._episode = _Episode(0, seed)
        self._coming: tuple[Seen, list[float], _Episode] | None = None
        self._last: Inference | None = None
        self._stack = ExitStack()

    @property
    def plans(self) -> list[Plan]:
        return self._last.plans if self._last else []

    @property
    def lengths(self) -> list[int]:
        return self._last.prefill.lengths(self._family.depth) if self._last else []

    def __enter__(self) -> Self:
        family = self._family
        with ExitStack() as stack:
            stack.enter_context(self._pruning)
            stack.enter_context(bound(family.policy, family.pictures, self._with_pictures))
            stack.enter_context(bound(family.policy, "reset", self._with_reset))
            stack.enter_context(bound(family.model, "sample_actions", self._with_sampling))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Remove every hook and every wrapper."""
        self._stack.close()

    def _with_pictures(self, make: Any) -> Any:
        def pictures(batch: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
            images, masks = make(batch)
            images, masks, seen = self._family.see(batch, images, masks)
            self._coming = seen, self._times_s(batch, len(images[0])), self._episode
            return images, masks

        return pictures

    def _with_sampling(self, sample: Any) -> Any:
        def sample_actions(*args: Any, **kwargs: Any) -> Any:
            coming, self._coming = self._coming, None
            if coming is None:
                return sample(*args, **kwargs)
            seen, times_s, episode = coming
            memories = episode.begin_inference(times_s)
            self._pruning.expect(Request(seen, self._budget(seen), memories, tuple(times_s)))
            try:
                actions = sample(*args, **kwargs)
                self._last = self._pruning.inference
            finally:
                self._pruning.forget()
            self._remember(episode)
            return actions

        return sample_actions

    def _with_reset(self, reset: Any) -> Any:
        def begin() -> None:
            reset()
            self._episode = _Episode(self._episode.number + 1, self._episode.seed)

        return begin

    def _remember(self, episode: _Episode) -> None:
        last = self._last
        assert last is not None
        for memory in last.request.memories:
            memory.tick += 1
        if not last.steps.looks:
            return
        rows = zip(
            last.request.memories, last.request.times_s, last.plans, last.attention(), strict=True
        )
        for memory, time_s, plan, attention in rows:
            grid = last.request.seen.grid
            remember(memory, attention, plan.anchor, grid, time_s=time_s, epoch=episode.number)

    def _times_s(self, batch: dict[str, Any], rows: int) -> list[float]:
        """When each sequence's pictures were taken: the batch's timestamps, or a step clock."""
        given = batch.get("timestamp")
        if given is None:
            steps = self._episode.inferences * self._family.policy.config.n_action_steps
            return [steps * self._dt_s] * rows
        times = given.flatten().tolist() if isinstance(given, Tensor) else [float(given)]
        return times * (rows // len(times))

    def _budget(self, seen: Seen) -> Budget:
        if self._retain is not None:
            return Budget.ratio(self._retain, of=seen.tokens)
        return Budget(min(self._tokens or 0, seen.tokens))
