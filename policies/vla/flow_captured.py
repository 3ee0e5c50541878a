"""The flow steps of lerobot's policies in fixed shapes, which a GPU replays as captured graphs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..graphs.capture import GraphPool, Program
from ..graphs.constants import Constants
from .flow import FlowPruning, FlowSteps
from .flow_family import FlowFamily

KEPT = 16
"""Shapes of a prefix that are kept, each with a copy of its keys and values: 5 MB (SmolVLA) to
15 MB (pi0) at full length. The one that was not used for the longest time goes."""


class CapturedFlow:
    """The flow steps of a policy, under its pruning; one graph for each shape of a prefix.

    The first step over a shape captures it, which takes about three steps. A graph is of one step,
    so it serves any number of them. Calls from several threads must not overlap.
    """

    def __init__(self, family: FlowFamily, pruning: FlowPruning, device: torch.device) -> None:
        self.pool = GraphPool(device)
        self._family, self._pruning, self._constants = family, pruning, Constants()
        self.step = lru_cache(KEPT)(partial(_Step, family, pruning, self.pool))

    def __call__(
        self,
        steps: FlowSteps,
        noise: Tensor,
        count: int,
        padding: Tensor,
        cache: Any,
        *beside: Tensor,
    ) -> Tensor:
        """Actions float32 [b, chunk, a] after `count` flow steps; `steps` notes what they see.

        The others as in `FlowFamily.velocity`.
        """
        from lerobot.policies.common.flow_matching import euler_integrate

        places = [steps.alive[layer] for layer in sorted(steps.alive)]
        sets = {id(kept): kept for kept in places if kept is not None}
        numbers = {None: 0} | {key: i for i, key in enumerate(sets, 1)}
        layout = tuple(numbers[None if kept is None else id(kept)] for kept in places)
        held = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        given = (steps.looked, padding, *sets.values(), *held, *beside)
        step = self.step(layout, tuple((part.shape, part.dtype) for part in given))
        step.begin(given)
        with self._constants:
            actions: Tensor = euler_integrate(step, noise, count)
        steps.looked, steps.looks = step.looked.clone(), step.looks * count
        return actions


class _Step:
    """One flow step over tensors of its own, which `begin` fills: (noisy, time) -> velocity.

    layout: of each layer, which of the sets of places it has left, from 1 on; 0 = all places.
    like: shapes and dtypes of what `begin` takes. looked: what the steps since then saw, summed
    over `looks` layers of each.
    """

    def __init__(
        self,
        family: FlowFamily,
        pruning: FlowPruning,
        pool: GraphPool,
        layout: tuple[int, ...],
        like: tuple[tuple[torch.Size, torch.dtype], ...],
    ) -> None:
        self._family, self._pruning = family, pruning
        self._own = [torch.zeros(shape, dtype=kind, device=pool.device) for shape, kind in like]
        self.looked, self._padding, *rest = self._own
        sets, rest = rest[: max(layout)], rest[max(layout) :]
        self._alive = {layer: sets[i - 1] if i else None for layer, i in enumerate(layout)}
        held, self._beside = rest[: 2 * len(layout)], rest[2 * len(layout) :]
        self._keys, self._values = held[::2], held[1::2]
        self._cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(self._keys, self._values, strict=True)):
            self._cache.update(key, value, layer)
        self.looks = 0
        name = f"A flow step of {type(family.policy).__name__}"
        self._program = Program(pool, name, self._run, state=[self.looked])

    def begin(self, given: Sequence[Tensor]) -> None:
        """Go on from a prefix that was prefilled otherwise, and what was seen of it."""
        for own, values in zip(self._own, given, strict=True):
            own.copy_(values)

    def __call__(self, noisy: Tensor, time: Tensor) -> Tensor:
        return self._program(noisy, time)[0]

    def _run(self, noisy: Tensor, time: Tensor) -> tuple[Tensor]:
        layers: Any = self._cache.layers
        for layer, key, value in zip(layers, self._keys, self._values, strict=True):
            layer.keys, layer.values = key, value
        steps = FlowSteps(self.looked.shape[1], self._alive, self.looked)
        with self._pruning as pruning:
            pruning.steps = steps
            velocity = self._family.velocity(noisy, time, self._padding, self._cache, *self._beside)
        self.looks = steps.looks
        return (velocity,)
