"""Shrinking a decoder's sequence without touching its forward.

Pre-hooks stand before the text model (tokens leave before layer 0) and before its decoder layers
(tokens leave inside). Text keeps its places; original position ids survive; attention masks,
rotary tables and decode steps are re-indexed to what is alive at each layer.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stream.data import Budget, PatchGrid, VisualTokens
from stream.errors import AttachError, ConfigError
from stream.memory import Memory
from stream.plan import Plan
from stream.reducers.base import Reducer, reduce_stage
from stream.signals import Signal, Signals

from .probes import Probe, last_row, probing

Positions = Literal["keep", "renumber"]

_attached: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True, slots=True)
class VideoSpan:
    """The visual tokens of one video inside one sequence.

    slots: long [n], their places in the sequence; plan: what became of the video's tokens so far.
    """

    slots: Tensor
    grid: PatchGrid
    pts_s: tuple[float, ...]
    budget: Budget
    plan: Plan
    signals: Signals
    memory: Memory = field(default_factory=Memory)

    def reduced(self, reducer: Reducer, x: Tensor, extra: dict[Signal, Tensor]) -> Plan:
        """Run one stage over this video's rows of x [t, d]; `extra` signals are [t]."""
        tokens = VisualTokens(x[self.slots], self.plan.anchor, self.grid, self.pts_s)
        local = {signal: value[self.slots] for signal, value in extra.items()}
        return reduce_stage(reducer, tokens, self.signals.extended(local), self.budget, self.memory)


def lift(plans: list[tuple[Tensor, Plan]], length: int, device: torch.device) -> Plan:
    """Plans over some places of a sequence -> one plan over the whole sequence.

    plans: (slots long [n], plan over n tokens) of each video; all other places pass. The rows of
    a plan take the places of its anchors in order, so a plan whose rows are not ascending keeps
    its own order.
    """
    passing = torch.ones(length, dtype=torch.bool, device=device)
    anchors, places, rows, cols, weights = [], [], [], [], []
    first = 0
    for slots, plan in plans:
        passing[slots] = False
        row, col, weight = plan.entries()
        anchors.append(slots[plan.anchor])
        places.append(slots[plan.anchor.sort().values])
        rows.append(row + first)
        cols.append(slots[col])
        weights.append(weight)
        first += plan.k
    text = passing.nonzero().squeeze(-1)
    anchor = torch.cat([*anchors, text])
    place = torch.cat([*places, text])
    order = torch.argsort(place)
    if all(plan.is_gather for _, plan in plans):
        return Plan.keep(anchor[order], length)
    row = torch.cat([*rows, torch.arange(first, first + text.numel(), device=device)])
    weight = torch.cat([*weights, torch.ones(text.numel(), device=device)])
    new_row = torch.argsort(order)[row]
    return Plan.merge(anchor[order], new_row, torch.cat([*cols, text]), weight, length)


@dataclass(slots=True)
class _Prefill:
    """One prefill and the decode steps that follow it.

    rows: the videos of each sequence of the batch. entered: long [b, n0], original places of
    what entered layer 0, of `full_length`; later: tokens seen since. alive: at a layer and after,
    indices into layer 0's sequence, long [b, n]; None while everything is alive. shift: added to
    decode positions.
    """

    rows: list[list[VideoSpan]]
    full_length: int
    entered: Tensor | None = None
    length: int = 0
    later: int = 0
    alive: dict[int, Tensor | None] = field(default_factory=dict)
    shift: Tensor | None = None
    last_rows: dict[int, Tensor] = field(default_factory=dict)
    running: bool = True


class ReductionHooks:
    """Attaches the stages of a reducer to a text model. A context manager.

    Call `expect` with the videos of the next prefill; without it the model runs untouched.
    `rows` then holds the videos with their final plans.
    """

    def __init__(
        self,
        text_model: PreTrainedModel,
        layers: nn.ModuleList,
        stages: tuple[Reducer, ...],
        positions: Positions,
    ) -> None:
        self._text_model = text_model
        self._layers = layers
        self._before = [s for s in stages if not s.site.in_llm]
        self._inside = {s.site.layer_index(len(layers)): s for s in stages if s.site.in_llm}
        if len(self._before) + len(self._inside) < len(stages):
            raise AttachError(
                f"Two stages act at one layer of a model with {len(layers)} layers; "
                "set their `layer` apart."
            )
        if positions not in get_args(Positions):
            raise ConfigError(
                f"positions is '{positions}'; allowed: {', '.join(get_args(Positions))}."
            )
        self._positions = positions
        self._expected: list[list[VideoSpan]] | None = None
        self._positions_inferred = False
        self._prefill: _Prefill | None = None
        self._by_cache: WeakKeyDictionary[Any, _Prefill | None] = WeakKeyDictionary()
        self._stack = ExitStack()

    @property
    def rows(self) -> list[list[VideoSpan]]:
        """The videos of the last prefill, with what became of them."""
        return self._prefill.rows if self._prefill else []

    def expect(self, rows: list[list[VideoSpan]]) -> None:
        """The videos of each sequence of the next prefill."""
        self._expected = rows if any(rows) else None

    def infer_positions(self, inferred: bool) -> None:
        """Whether the model itself makes up the next positions from what its first layer holds."""
        self._positions_inferred = inferred

    def lengths(self) -> list[int]:
        """Tokens (text included) that entered each decoder layer in the last prefill."""
        if self._prefill is None:
            return []
        alive = self._prefill.alive
        lengths, now = [], self._prefill.length
        for layer in range(len(self._layers)):
            kept = alive.get(layer)
            now = now if kept is None else kept.shape[1]
            lengths.append(now)
        return lengths

    def __enter__(self) -> ReductionHooks:
        if self._text_model in _attached:
            raise AttachError(
                f"{type(self._text_model).__name__} is pruned already; detach the first reducer "
                "before attaching another, or chain them into one."
            )
        requests: dict[nn.Module, Probe] = {}
        for layer in self._inside:
            if Signal.LAST_ROW in self._inside[layer].needs:
                attention = self._layers[layer - 1].get_submodule("self_attn")
                requests[attention] = self._row_probe(layer)
        with ExitStack() as stack:
            if requests:
                stack.enter_context(probing(self._text_model, requests))
            hook = self._text_model.register_forward_pre_hook(self._enter_model, with_kwargs=True)
            stack.callback(hook.remove)
            for index in range(min(self._inside, default=len(self._layers)), len(self._layers)):
                hook = self._layers[index].register_forward_pre_hook(
                    self._layer_hook(index), with_kwargs=True
                )
                stack.callback(hook.remove)
            _attached.add(self._text_model)
            stack.callback(_attached.discard, self._text_model)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        self._expected = None

    def _row_probe(self, layer: int) -> Probe:
        def probe(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None) -> None:
            if self._prefill is not None and self._prefill.running:
                self._prefill.last_rows[layer] = last_row(query, key, scaling, mask)

        return probe

    def _enter_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        embeds = kwargs.get("inputs_embeds")
        cache = kwargs.get("past_key_values")
        if embeds is None:
            return None
        if getattr(cache, "is_compileable", False):
            raise AttachError(
                f"{type(cache).__name__} has layers of one fixed length, but pruned layers are "
                "shorter; generate with the default dynamic cache."
            )
        if cache is not None and cache.get_seq_length() > 0:
            self._prefill = self._by_cache.get(cache, self._prefill)
            return self._continue(args, kwargs)
        self._prefill = None
        if self._expected is not None:
            self._prefill = _Prefill(self._expected, full_length=embeds.shape[1])
        if cache is not None:
            self._by_cache[cache] = self._prefill
        if self._prefill is None:
            return None
        self._expected = None
        if len(self._prefill.rows) != embeds.shape[0]:
            raise AttachError(
                f"{len(self._prefill.rows)} sequences were announced, {embeds.shape[0]} came."
            )
        kwargs = self._shrink_inputs(dict(kwargs), embeds)
        self._prefill.length = kwargs["inputs_embeds"].shape[1]
        return args, kwargs

    def _shrink_inputs(self, kwargs: dict[str, Any], embeds: Tensor) -> dict[str, Any]:
        state = self._prefill
        assert state is not None
        for reducer in self._before:
            embeds, entered = self._apply_stage(reducer, embeds, {})
            state.entered = entered if state.entered is None else state.entered.gather(1, entered)
        if state.entered is None or state.entered.shape[1] == state.full_length:
            state.entered = None
            return kwargs
        batch, length, device = embeds.shape[0], embeds.shape[1], embeds.device
        position = kwargs.get("position_ids")
        if position is None:
            position = torch.arange(state.full_length, device=device)[None]
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones(batch, state.full_length, dtype=torch.long, device=device)
        kept = torch.take_along_dim(position, _like(state.entered, position), dim=-1)
        if self._positions == "renumber":
            dense = torch.arange(length, device=device).expand_as(kept)
            state.shift = dense[..., -1:] - kept[..., -1:]
            kept = dense
        kwargs.pop("cache_position", None)
        return kwargs | {
            "inputs_embeds": embeds,
            "position_ids": kept.contiguous(),
            "attention_mask": mask.gather(1, state.entered),
        }

    def _continue(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A decode step, or more text after a pruned prefill: new tokens are always kept."""
        state = self._prefill
        if state is None:
            return None
        state.running = False
        state.later = kwargs["past_key_values"].get_seq_length() - state.length
        if state.entered is None:
            return None
        kwargs = dict(kwargs)
        kwargs.pop("cache_position", None)
        mask = kwargs.get("attention_mask")
        lost = state.full_length - state.length
        first = state.full_length + state.later
        new = kwargs["inputs_embeds"].shape[1]
        if mask is not None:
            if mask.shape[-1] != first + new:
                raise AttachError(
                    f"{new} tokens follow {first} seen ones, but the mask covers {mask.shape[-1]}; "
                    "on a pruned cache pass only new tokens, with a mask over all of them."
                )
            kwargs["attention_mask"] = mask.gather(
                1, _columns(state.entered, state.full_length, mask.shape[1])
            )
        position = kwargs.get("position_ids")
        if position is None:
            position = torch.arange(first, first + new, device=state.entered.device)[None]
        elif self._positions_inferred and mask is None:
            position = position + lost
        kwargs["position_ids"] = position if state.shift is None else position + state.shift
        return args, kwargs

    def _layer_hook(self, layer: int) -> Any:
        def pre(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            state = self._prefill
            if state is None:
                return None
            hidden, rest = (args[0], args[1:]) if args else (kwargs["hidden_states"], None)
            if state.running:
                hidden = self._enter_layer(layer, hidden)
            alive = state.alive.get(layer)
            if alive is None:
                return None
            kwargs = dict(kwargs)
            mask = kwargs.get("attention_mask")
            if state.running:
                rotary = kwargs.get("position_embeddings")
                if rotary is not None:
                    kwargs["position_embeddings"] = tuple(
                        torch.take_along_dim(t, _like(alive, t[..., 0])[..., None], dim=-2)
                        for t in rotary
                    )
                kwargs["position_ids"] = None
                if mask is not None:
                    mask = torch.take_along_dim(mask, alive[:, None, :, None], dim=-2)
                    mask = torch.take_along_dim(mask, alive[:, None, None, :], dim=-1)
            else:
                held = kwargs["past_key_values"].layers[layer].get_seq_length()
                if held != alive.shape[1] + state.later:
                    raise AttachError(
                        f"Layer {layer} holds {held} tokens instead of "
                        f"{alive.shape[1] + state.later}: the cache was cropped, as assisted "
                        "decoding does, but pruned layers differ in length. Generate without it."
                    )
            if not state.running and mask is not None:
                columns = _columns(alive, state.length, mask.shape[-1])
                mask = torch.take_along_dim(mask, columns[:, None, None, :], dim=-1)
            kwargs["attention_mask"] = mask
            if rest is None:
                return args, kwargs | {"hidden_states": hidden}
            return (hidden, *rest), kwargs

        return pre

    def _enter_layer(self, layer: int, hidden: Tensor) -> Tensor:
        """Prefill: run the stage of this layer, if any, and note what is alive from here on."""
        state = self._prefill
        assert state is not None
        alive = state.alive.get(layer - 1)
        reducer = self._inside.get(layer)
        if reducer is not None:
            extra = {}
            if layer in state.last_rows:
                extra[Signal.LAST_ROW] = state.last_rows.pop(layer)
            before = hidden.shape[1]
            hidden, kept = self._apply_stage(reducer, hidden, extra)
            if hidden.shape[1] < before:
                alive = kept if alive is None else alive.gather(1, kept)
        state.alive[layer] = alive
        return hidden

    def _apply_stage(
        self, reducer: Reducer, x: Tensor, extra: dict[Signal, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """x [b, n, d] -> (x of what is left [b, k, d], its places among the n, long [b, k])."""
        state = self._prefill
        assert state is not None
        outputs, kept, rows = [], [], []
        for i, spans in enumerate(state.rows):
            local = {signal: value[i] for signal, value in extra.items()}
            plans = [(s.slots, s.reduced(reducer, x[i], local)) for s in spans]
            whole = lift(plans, x.shape[1], x.device)
            outputs.append(whole.apply(x[i]))
            kept.append(whole.anchor)
            slot_of = torch.empty(x.shape[1], dtype=torch.long, device=x.device)
            slot_of[whole.anchor] = torch.arange(whole.k, device=x.device)
            rows.append(
                [
                    replace(s, slots=slot_of[s.slots[plan.anchor]], plan=plan @ s.plan)
                    for s, (_, plan) in zip(spans, plans, strict=True)
                ]
            )
        if len({o.shape[0] for o in outputs}) > 1:
            raise AttachError(
                "The sequences of the batch shrink to different lengths "
                f"({sorted({o.shape[0] for o in outputs})}); give all videos of a batch the same "
                "number of frames, or run them one by one."
            )
        state.rows = rows
        return torch.stack(outputs), torch.stack(kept)


def _like(index: Tensor, target: Tensor) -> Tensor:
    """index [b, n] with leading axes of 1 until it has as many axes as `target`."""
    return index.view((1,) * (target.ndim - index.ndim) + index.shape)


def _columns(alive: Tensor, length: int, width: int) -> Tensor:
    """Key columns at a layer: what is alive of the prefill, then every later token."""
    later = torch.arange(length, width, device=alive.device).expand(alive.shape[0], -1)
    return torch.cat([alive, later], dim=1)
