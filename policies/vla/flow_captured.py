"""What a GPU replays of lerobot's flow policies: encoders, layers of a prefix, and flow steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..graphs.alone import Alone
from ..graphs.capture import GraphPool, Program
from ..graphs.constants import Constants
from ..graphs.kept import Kept, weakly
from ..graphs.replays import Replays
from ..graphs.standing import Standing
from .flow import FlowPruning, FlowSteps, Inference, Request
from .flow_family import FlowFamily
from .lean import at_once, lean_parts

KEPT = 16
"""Shapes that are kept of each part. A flow step holds a copy of the prefix's keys and values, 5 MB
(SmolVLA) to 15 MB (pi0) at full length. The shape that was not used for the longest time goes."""

_alone: WeakKeyDictionary[nn.Module, Alone] = WeakKeyDictionary()
"""By network, whose modules are lean while one call is under way."""

Like = tuple[tuple[torch.Size, torch.dtype], ...]
"""Shapes and dtypes of what a graph takes."""


class CapturedFlow(Standing):
    """Parts of a policy, under its pruning, in fixed shapes.

    What runs is lerobot's own code, but for norms, MLPs, rotation and attention, which take fewer
    kernels, and for pictures, which are embedded all at once: actions are the same up to rounding.

    The first call of a shape captures it, which takes about three calls. A call that overlaps
    another on the same network is refused with AttachError. Ask `ready` before each call.
    """

    def __init__(self, family: FlowFamily, pruning: FlowPruning, device: torch.device) -> None:
        super().__init__(type(family.policy).__name__, lambda: (family.model,), device)
        self._choices = Replays()
        self._alone = _alone.setdefault(family.model, self._alone)
        self._family, self._pruning, self._constants = family, pruning, Constants()
        self.eyes: Kept[Like, Program] = Kept(KEPT)
        self.sections: Kept[tuple[int, int, Like], Program] = Kept(KEPT)
        self.steps: Kept[tuple[tuple[int, ...], Like], _Step] = Kept(KEPT)

    def _kept(self) -> list[Kept[Any, Any]]:
        return [self.eyes, self.sections, self.steps, self._choices.programs]

    def embed(
        self, pictures: Sequence[Tensor], masks: Sequence[Tensor], *words: Tensor
    ) -> tuple[Tensor, ...]:
        """As `FlowFamily.embed`."""
        given = (*pictures, *masks, *words)
        with self._alone, self._constants:
            made = self._eye(len(pictures), _like(given))(*given)
            return tuple(part.clone() for part in made)

    def _eye(self, n: int, like: Like) -> Program:
        """like: of n pictures, their masks and words."""
        name = f"The eyes of {type(self._family.policy).__name__}"
        return self.eyes.get(like, lambda: Program(self.pool, name, weakly(self._run_eye, n)))

    def _run_eye(self, n: int, *given: Tensor) -> tuple[Tensor, ...]:
        pictures = given[:n]
        with _lean(self._family), at_once(self._family.towers, pictures):
            return self._family.embed(pictures, given[n : 2 * n], *given[2 * n :])

    def prefill(
        self, request: Request, embeds: Tensor, padding: Tensor, blocks: Tensor
    ) -> tuple[Any, Inference]:
        """The cache of a prefix, and what became of its tokens.

        Layers are replayed, and of the stages between them what does not need the episode's memory.
        """
        with self._alone:
            return self._prefill(request, embeds, padding, blocks)

    def _prefill(self, request: Request, *prefix: Tensor) -> tuple[Any, Inference]:
        pruning, cache = self._pruning, DynamicCache()
        pruning.check()
        hidden, positions, mask = self._family.entering(*prefix)
        pruning.expect(request)
        try:
            with self._choices.on(self.pool):
                for first, stop in pruning.sections:
                    given = pruning.enter(first, hidden, positions, mask)
                    with self._constants:
                        hidden, last, *held = self._section(first, stop, _like(given))(*given)
                        for i, layer in enumerate(range(first, stop)):
                            cache.update(held[2 * i], held[2 * i + 1], layer)
                    pruning.leave(first, stop, last, *given[1:])
            inference = pruning.inference
        finally:
            pruning.forget()
        assert inference is not None
        return cache, inference

    def _section(self, first: int, stop: int, like: Like) -> Program:
        """(hidden, positions, mask) -> (what leaves the last layer, what entered it, and the keys
        and values of all layers)"""
        name = f"Layers {first} to {stop - 1} of {type(self._family.policy).__name__}"
        work = weakly(self._run_section, range(first, stop))
        return self.sections.get((first, stop, like), lambda: Program(self.pool, name, work))

    def _run_section(
        self, which: range, hidden: Tensor, positions: Tensor, mask: Tensor
    ) -> tuple[Tensor, ...]:
        cache, last = DynamicCache(), hidden
        with _lean(self._family):
            for left in self._family.layers(which, hidden, positions, mask, cache):
                last, hidden = hidden, left
        layers: Any = cache.layers[which.start : which.stop]
        return hidden, last, *(part for own in layers for part in (own.keys, own.values))

    def flow(
        self,
        steps: FlowSteps,
        noise: Tensor,
        count: int,
        padding: Tensor,
        cache: Any,
        *beside: Tensor,
    ) -> Tensor:
        """Actions float32 [b, chunk, a] after `count` flow steps; `steps` notes what they see.

        A graph is of one step, so it serves any number of them. The others are as in
        `FlowFamily.velocity`.
        """
        from lerobot.policies.common.flow_matching import euler_integrate

        self._pruning.check()
        places = [steps.alive[layer] for layer in sorted(steps.alive)]
        sets = {id(kept): kept for kept in places if kept is not None}
        numbers = {None: 0} | {key: i for i, key in enumerate(sets, 1)}
        layout = tuple(numbers[None if kept is None else id(kept)] for kept in places)
        held = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        given = (steps.looked, padding, *sets.values(), *held, *beside)
        with self._alone, self._constants:
            step = self._step(layout, _like(given))
            step.begin(given)
            actions: Tensor = euler_integrate(step, noise, count)
            steps.looked, steps.looks = step.looked.clone(), step.looks * count
        return actions

    def _step(self, layout: tuple[int, ...], like: Like) -> _Step:
        return self.steps.get(
            (layout, like), lambda: _Step(self._family, self._pruning, self.pool, layout, like)
        )


class _Step:
    """One flow step over tensors of its own, which `begin` fills: (noisy, time) -> velocity.

    layout: of each layer, which of the sets of places it has left, from 1 on; 0 = all places.
    like: of what `begin` takes. looked: what the steps since then saw, summed
    over `looks` layers of each.
    """

    def __init__(
        self,
        family: FlowFamily,
        pruning: FlowPruning,
        pool: GraphPool,
        layout: tuple[int, ...],
        like: Like,
    ) -> None:
        self._family, self._pruning = family, pruning
        self._own = [torch.zeros(shape, dtype=kind, device=pool.device) for shape, kind in like]
        self.looked, self._padding, *rest = self._own
        sets, rest = rest[: max(layout)], rest[max(layout) :]
        self._alive = {layer: sets[i - 1] if i else None for layer, i in enumerate(layout)}
        held, self._beside = rest[: 2 * len(layout)], rest[2 * len(layout) :]
        self._cache = DynamicCache()
        layers: Any = self._cache.layers
        for layer, (key, value) in enumerate(zip(held[::2], held[1::2], strict=True)):
            self._cache.update(key, value, layer)
            layers[layer].keys, layers[layer].values = key, value
        self.looks = 0
        name = f"A flow step of {type(family.policy).__name__}"
        self._program = Program(pool, name, weakly(self._run), state=[self.looked])

    def begin(self, given: Sequence[Tensor]) -> None:
        """Go on from a prefix that was prefilled otherwise, and what was seen of it."""
        for own, values in zip(self._own, given, strict=True):
            own.copy_(values)

    def __call__(self, noisy: Tensor, time: Tensor) -> Tensor:
        return self._program(noisy, time)[0]

    def _run(self, noisy: Tensor, time: Tensor) -> tuple[Tensor]:
        cache = copy(self._cache)  # what a step adds goes when it ends
        cache.layers = [copy(layer) for layer in self._cache.layers]
        steps = FlowSteps(self.looked.shape[1], self._alive, self.looked)
        with _lean(self._family), self._pruning as pruning:
            pruning.steps = steps
            velocity = self._family.velocity(noisy, time, self._padding, cache, *self._beside)
        self.looks = steps.looks
        return (velocity,)


@contextmanager
def _lean(family: FlowFamily) -> Iterator[None]:
    with lean_parts(family.model), family.capturable():
        yield


def _like(tensors: Sequence[Tensor]) -> Like:
    return tuple((tensor.shape, tensor.dtype) for tensor in tensors)
