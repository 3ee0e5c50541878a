"""Pruning inside lerobot's flow-matching policies.

Their prefix (cameras, instruction, in some the state) is prefilled once; an action expert then
reads its keys and values in every flow step. Visual tokens leave the prefix at the entry of a
layer, the first one included, and keep their positions. The policy itself goes on counting the
whole prefix, so the expert's positions stay where they were; masks are gathered, layer by layer,
to the tokens that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import FunctionType, MethodType
from typing import Any, Self
from weakref import WeakSet

import torch
from torch import Tensor, nn

from stream.data import Budget
from stream.errors import AttachError
from stream.memory import Memory
from stream.ops.replayed import replayable
from stream.plan import Plan
from stream.reducers.base import Reducer
from stream.signals import Signal, Signals

from ..fit import check_fit
from ..prefill import Prefill, VideoSpan
from ..query_rows import ROW_SIGNALS, QueryRows
from .flow_family import FlowFamily, Seen

_attached: WeakSet[nn.Module] = WeakSet()


@contextmanager
def bound(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """While open, `owner.name` is `wrap(its bound method)`, on this instance alone."""
    before = vars(owner).get(name)
    setattr(owner, name, wrap(getattr(owner, name)))
    try:
        yield
    finally:
        delattr(owner, name)
        if before is not None:
            setattr(owner, name, before)


def instead(new: Any, old: Any) -> Any:
    """What `bound` wraps by where it takes the place of the method."""
    return new


def with_globals(method: Any, **own: Any) -> Any:
    """A method that finds `own` in place of globals of its module, which stay as they are for all
    others; the method itself where it knows no such globals."""
    function = getattr(method, "__func__", None)
    known: dict[str, Any] = getattr(function, "__globals__", {})
    if function is None or own.keys() - known.keys():
        return method
    twin = FunctionType(
        function.__code__,
        {**known, **own},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    return MethodType(twin, method.__self__)


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of the next prefix. memories, times_s: one for each sequence of the batch."""

    seen: Seen
    budget: Budget
    memories: tuple[Memory, ...]
    times_s: tuple[float, ...]


@dataclass(slots=True)
class FlowSteps:
    """The flow steps over one prefix.

    length: of the whole prefix. alive: by layer, long [b, n], places that are left; None = all.
    looked: float32 [b, length], what the action rows paid to each place, summed over `looks`
    layers and steps. step: steps begun, less one.
    """

    length: int
    alive: dict[int, Tensor | None]
    looked: Tensor
    looks: int = 0
    step: int = -1


@dataclass(frozen=True, slots=True)
class Inference:
    """One prefilled prefix and the flow steps over it."""

    request: Request
    prefill: Prefill
    steps: FlowSteps

    @property
    def plans(self) -> list[Plan]:
        """For each sequence: what became of the places in the grid of all cameras."""
        return [span.plan for (span,) in self.prefill.rows]

    def anew(self) -> Inference:
        """The same prefix, as if no flow step had begun."""
        before = self.steps
        steps = FlowSteps(before.length, before.alive, torch.zeros_like(before.looked))
        return Inference(self.request, self.prefill, steps)

    def attention(self) -> list[Tensor]:
        """For each sequence: what the actions paid to each token left, float32 [k]."""
        steps = self.steps
        alive = steps.alive[max(steps.alive)]
        slots = [span.slots for (span,) in self.prefill.rows]
        if alive is not None:
            slots = [alive[i, at] for i, at in enumerate(slots)]
        return [steps.looked[i, at] / max(steps.looks, 1) for i, at in enumerate(slots)]


class FlowPruning:
    """Runs the stages of a reducer inside a policy. A context manager.

    Call `expect` before a prefix runs; without it the prefix, and the flow steps over it, run
    untouched. Later flow steps belong to `steps`; set it to go back to an earlier prefix.

    look: watch what the actions look at even if the reducer does not remember it.
    """

    def __init__(self, family: FlowFamily, reducer: Reducer, look: bool = False) -> None:
        check_fit(type(family.policy).__name__, reducer, family.provides, family.provides_inside)
        depth = family.depth
        self._family = family
        self._stages = {
            stage.site.layer_index(depth) if stage.site.in_llm else 0: stage
            for stage in reducer.stages
        }
        if len(self._stages) < len(reducer.stages):
            raise AttachError("Two stages act at one place of the model; set their `layer` apart.")
        self._scored = {at: stage.needs & ROW_SIGNALS for at, stage in self._stages.items()}
        self._keeps_inputs = any(
            Signal.INPUT_EMBEDDINGS in stage.needs for at, stage in self._stages.items() if at
        )
        self.action_layers = frozenset(
            layer for stage in reducer.stages for layer in stage.action_layers(depth)
        )
        if look and not self.action_layers:
            self.action_layers = frozenset(range(depth // 2, depth))
        self.inference: Inference | None = None
        self.steps: FlowSteps | None = None
        self._request: Request | None = None
        self._shown: tuple[Tensor, Tensor, Tensor] | None = None
        self._stack = ExitStack()

    def expect(self, request: Request) -> None:
        """Announce the next prefix."""
        self._request = request

    def forget(self) -> None:
        """What runs next runs untouched."""
        self._request = self.inference = self.steps = self._shown = None

    def lengths(self) -> list[int]:
        """Tokens, text included, that entered each layer of the last prefix."""
        return self.inference.prefill.lengths(self._family.depth) if self.inference else []

    @property
    def sections(self) -> list[tuple[int, int]]:
        """(first, stop) of the layers between which no token leaves."""
        firsts = sorted({0, *self._stages})
        return list(pairwise([*firsts, self._family.depth]))

    def check(self) -> None:
        """Raises AttachError where the policy cannot be pruned now."""
        policy = self._family.policy
        name = type(policy).__name__
        if policy in _attached:
            raise AttachError(
                f"{name} is pruned already; detach the first reducer before attaching another."
            )
        if policy.training:
            raise AttachError(f"{name} is in training mode; call policy.eval() before pruning.")
        if policy.config.compile_model:
            raise AttachError(
                f"{name} was built with compile_model=True, whose graphs are of the full length; "
                "load it with config.compile_model = False."
            )

    def __enter__(self) -> Self:
        self.check()
        policy, model = self._family.policy, self._family.model

        def refuse(forward: Any) -> Any:
            def training_step(*args: Any, **kwargs: Any) -> Any:
                raise AttachError("Pruning is for inference; detach the reducer before training.")

            return training_step

        with ExitStack() as stack:
            stack.enter_context(bound(model, "forward", refuse))
            stack.enter_context(self._family.intercept(self))
            _attached.add(policy)
            stack.callback(_attached.discard, policy)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        self.forget()

    def enter(
        self, layer: int, hidden: Tensor, positions: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The prefix comes to a layer: run its stage, and return what is left.

        hidden: [b, n, d], what the layer before left; positions: long [b, n0] and mask
        [b, ..., n0, n0], bool or added to logits, of the whole prefix.
        """
        if layer == 0:
            self._begin(hidden, positions, mask)
        if self.inference is None:
            return hidden, positions, mask
        prefill = self.inference.prefill
        hidden = prefill.enter_layer(layer, self._stages.get(layer), hidden)
        alive = prefill.alive[layer]
        if alive is not None:
            positions = positions.gather(1, alive)
            mask = _taken(_taken(mask, alive, -2), alive, -1)
        self._foresee(layer, hidden, positions, mask)
        return hidden, positions, mask

    def leave(self, first: int, stop: int, last: Tensor, positions: Tensor, mask: Tensor) -> None:
        """The prefix, having entered a layer, went on to `stop` without pause.

        last: [b, n, d], what entered layer stop - 1; the others as `enter` returned them.
        """
        assert self.inference is not None
        alive = self.inference.prefill.alive
        for layer in range(first + 1, stop):
            alive[layer] = alive[first]
        if stop - 1 > first:
            self._foresee(stop - 1, last, positions, mask)

    def alive(self, layer: int) -> Tensor | None:
        """long [b, n]: places of the prefix that are left at a layer; None = all."""
        return self.steps.alive[layer] if self.steps else None

    def enter_step(self, layer: int, mask: Tensor) -> Tensor:
        """A flow step comes to a layer: the mask [b, ..., s, n0 + s], of the keys it has.

        All layers of a step get one mask, and most have the same keys: it is made once for them.
        """
        if self.steps is None:
            return mask
        if layer == 0:
            self.steps.step += 1
        alive = self.steps.alive[layer]
        if alive is None:
            return mask
        if self._shown is None or self._shown[0] is not mask or self._shown[1] is not alive:
            own = torch.arange(self.steps.length, mask.shape[-1], device=mask.device)
            columns = torch.cat([alive, own.expand(len(alive), -1)], 1)
            self._shown = mask, alive, _taken(mask, columns, -1)
        return self._shown[2]

    def looks(self, layer: int) -> bool:
        """Whether the action attention of a layer is wanted in this flow step.

        Under autograd, as in real-time chunking's guidance, only that of the first one.
        """
        state = self.steps
        if state is None or layer not in self.action_layers:
            return False
        return state.step == 0 or (state.step > 0 and not torch.is_grad_enabled())

    def look(self, layer: int, received: Tensor) -> None:
        """received: [b, keys of the layer], mean over heads and action rows."""
        state = self.steps
        assert state is not None
        alive = state.alive[layer]
        width = state.length if alive is None else alive.shape[1]
        received = received.detach()[:, :width].float()
        if alive is None:
            state.looked += received
        else:
            state.looked.scatter_add_(1, alive, received)
        state.looks += 1

    def _begin(self, hidden: Tensor, positions: Tensor, mask: Tensor) -> None:
        request = self._request
        self.forget()
        if request is None:
            return
        batch, length = hidden.shape[:2]
        device, seen = hidden.device, request.seen
        shown = mask.diagonal(dim1=-2, dim2=-1).reshape(batch, -1, length)[:, 0]
        prompt = shown if shown.dtype == torch.bool else shown == 0
        last = torch.full((batch,), seen.stop - 1, device=device)
        queries = QueryRows.of(prompt, last, length - seen.stop)
        slots, index = seen.slots(device), seen.index(device)
        prefill = Prefill([], length, queries, length=length)
        self.steps = FlowSteps(length, prefill.alive, torch.zeros(batch, length, device=device))
        self.inference = Inference(request, prefill, self.steps)
        scores = {}
        if needs := self._scored.get(0):
            scores = self._scores(0, hidden, positions, mask, needs)
        prefill.rows = [
            [
                VideoSpan(
                    slots=slots,
                    grid=seen.grid,
                    pts_s=(time_s,) * seen.grid.frames,
                    budget=request.budget,
                    plan=Plan.keep(index, seen.grid.size),
                    signals=Signals({signal: score[i, slots] for signal, score in scores.items()}),
                    memory=memory,
                )
            ]
            for i, (memory, time_s) in enumerate(
                zip(request.memories, request.times_s, strict=True)
            )
        ]
        if self._keeps_inputs:
            prefill.inputs = hidden

    def _foresee(self, layer: int, hidden: Tensor, positions: Tensor, mask: Tensor) -> None:
        """What the stage of the next layer, if any, is told."""
        assert self.inference is not None
        if needs := self._scored.get(layer + 1):
            scores = self._scores(layer, hidden, positions, mask, needs)
            self.inference.prefill.signals[layer + 1] = scores

    def _scores(
        self,
        layer: int,
        hidden: Tensor,
        positions: Tensor,
        mask: Tensor,
        needs: frozenset[Signal],
    ) -> dict[Signal, Tensor]:
        assert self.inference is not None
        queries, wanted = self.inference.prefill.queries, sorted(needs)
        seen = replayable(
            (layer, *wanted, queries.tail),
            partial(self._received, layer, wanted, queries.tail),
            *(hidden, positions, mask, queries.prompt, queries.text),
        )
        return dict(zip(wanted, seen, strict=True))

    def _received(
        self,
        layer: int,
        wanted: Sequence[Signal],
        tail: int,
        hidden: Tensor,
        positions: Tensor,
        mask: Tensor,
        prompt: Tensor,
        text: Tensor,
    ) -> tuple[Tensor, ...]:
        queries = QueryRows(prompt, text, tail)
        attention = self._family.attention(layer, hidden, positions, mask)
        return tuple(attention.received(*queries.behind(signal)) for signal in wanted)


def _taken(mask: Tensor, index: Tensor, dim: int) -> Tensor:
    """Rows (dim -2) or columns (dim -1) of a mask [b, ..., n, m]; index: long [b, k]."""
    shape = [len(index), *[1] * (mask.ndim - 1)]
    shape[dim] = index.shape[1]
    return torch.take_along_dim(mask, index.view(shape), dim)
