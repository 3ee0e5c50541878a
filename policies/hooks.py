"""Shrinking a decoder's sequence without touching its forward.

Pre-hooks stand before the text model (tokens leave before layer 0) and before its decoder layers
(tokens leave inside). Text keeps its places; original position ids survive; attention masks,
rotary tables and decode steps are re-indexed to what is alive at each layer.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stream.errors import AttachError, ConfigError
from stream.reducers.base import Reducer
from stream.signals import Signal

from .prefill import Prefill, VideoSpan
from .probes import Attention, Probe, probing
from .query_rows import ROW_SIGNALS, QueryRows

Positions = Literal["keep", "renumber"]

INSIDE = ROW_SIGNALS | {Signal.INPUT_EMBEDDINGS}
"""Signals that any decoder of Llama's shape gives its stages."""

_attached: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True, slots=True)
class _Expected:
    rows: list[list[VideoSpan]]
    text_from: int
    prompt: Tensor | None

    def check(self, sequences: int) -> None:
        if len(self.rows) != sequences:
            raise AttachError(f"{len(self.rows)} sequences were announced, {sequences} came.")

    def queries(self, embeds: Tensor, mask: Tensor | None) -> QueryRows:
        """embeds: [b, n, d] of the prefill; mask: its attention mask in any form."""
        prompt = self.prompt
        if prompt is None:
            prompt = embeds.new_ones(embeds.shape[:2], dtype=torch.bool)
            if mask is not None and mask.ndim == 2:
                prompt = mask.bool()
        if prompt.shape != embeds.shape[:2]:
            raise AttachError(
                f"`prompt` is {tuple(prompt.shape)} for a prefill of {tuple(embeds.shape[:2])}; "
                "give one bool for each row of each sequence."
            )
        none = torch.full((1,), -1, device=embeds.device)
        last = [torch.cat([none, *(span.slots for span in row)]).amax() for row in self.rows]
        return QueryRows.of(prompt, torch.stack(last), embeds.shape[1] - self.text_from)


class ReductionHooks:
    """Attaches the stages of a reducer to a text model. A context manager.

    Call `expect` with the videos of the next prefill; without it the model runs untouched.
    `rows` then holds the videos with their final plans. Stages inside the model may read `INSIDE`.
    """

    def __init__(
        self,
        text_model: PreTrainedModel,
        layers: nn.ModuleList,
        stages: tuple[Reducer, ...],
        positions: Positions,
    ) -> None:
        self.text_model = text_model
        self.layers = layers
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
        self._expected: _Expected | None = None
        self._positions_inferred = False
        self._prefill: Prefill | None = None
        self._by_cache: WeakKeyDictionary[Any, Prefill | None] = WeakKeyDictionary()
        self._stack = ExitStack()

    @property
    def rows(self) -> list[list[VideoSpan]]:
        """The videos of the last prefill, with what became of them."""
        return self._prefill.rows if self._prefill else []

    def rows_at(self, layer: int) -> list[list[VideoSpan]]:
        """The same as they entered a layer of the model."""
        return self._prefill.rows_at(layer) if self._prefill else []

    def expect(
        self, rows: list[list[VideoSpan]], text_from: int, prompt: Tensor | None = None
    ) -> None:
        """Announce the next prefill.

        rows: the videos of each sequence. text_from: the place behind the
        last visual token, the smallest one of all sequences. prompt: bool [b, n], rows that count
        as the prompt's when its attention is read, so that slots of actions that are decoded in
        parallel do not; None = all that the 2-D attention mask shows.
        """
        self._expected = _Expected(rows, text_from, prompt)

    def adopt(self, cache: Any, rows: list[list[VideoSpan]], length: int) -> None:
        """Go on from a cache of `length` tokens that was filled without the hooks and from which
        nothing left; rows: the videos of each sequence."""
        prompt = torch.ones(len(rows), length, dtype=torch.bool)
        state = Prefill(rows, length, QueryRows(prompt, prompt, 0), length=length, running=False)
        self._prefill = self._by_cache[cache] = state

    def forget(self) -> None:
        """The next prefill runs untouched, whatever was announced."""
        self._expected = None

    def infer_positions(self, inferred: bool) -> None:
        """Whether the model itself makes up the next positions from what its first layer holds."""
        self._positions_inferred = inferred

    def lengths(self) -> list[int]:
        """Tokens (text included) that entered each decoder layer in the last prefill."""
        return self._prefill.lengths(len(self.layers)) if self._prefill else []

    def __enter__(self) -> ReductionHooks:
        if self.text_model in _attached:
            raise AttachError(
                f"{type(self.text_model).__name__} is pruned already; detach the first reducer "
                "before attaching another, or chain them into one."
            )
        requests: dict[nn.Module, Probe] = {}
        for layer, reducer in self._inside.items():
            if needs := reducer.needs & ROW_SIGNALS:
                attention = self.layers[layer - 1].get_submodule("self_attn")
                requests[attention] = self._row_probe(layer, needs)
        with ExitStack() as stack:
            if requests:
                stack.enter_context(probing(self.text_model, requests))
            hook = self.text_model.register_forward_pre_hook(self._enter_model, with_kwargs=True)
            stack.callback(hook.remove)
            for index in range(min(self._inside, default=len(self.layers)), len(self.layers)):
                hook = self.layers[index].register_forward_pre_hook(
                    self._layer_hook(index), with_kwargs=True
                )
                stack.callback(hook.remove)
            _attached.add(self.text_model)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()
        _attached.discard(self.text_model)

    def detach(self) -> None:
        """From here on the model runs untouched, but is not free for others before the end; what
        the last prefill came to stays to be read."""
        self._stack.close()
        self._expected = None

    def hand_over(self, sequences: int) -> tuple[list[list[VideoSpan]], tuple[Reducer, ...]]:
        """Detach; what was announced, and the stages inside the model, for somebody who prefills so
        many sequences in another way. No videos where nothing was."""
        expected = self._expected
        self.detach()
        if expected is None:
            return [], ()
        expected.check(sequences)
        return expected.rows, tuple(self._inside.values())

    def note(self, state: Prefill) -> None:
        """What became of the videos that were handed over."""
        self._prefill = state

    def _row_probe(self, layer: int, needs: frozenset[Signal]) -> Probe:
        def probe(attention: Attention) -> None:
            state = self._prefill
            if state is not None and state.running:
                state.signals[layer] = {
                    signal: attention.received(*state.queries.behind(signal)) for signal in needs
                }

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
        expected, self._expected = self._expected, None
        self._prefill = None
        if expected is not None:
            expected.check(embeds.shape[0])
            queries = expected.queries(embeds, kwargs.get("attention_mask"))
            self._prefill = Prefill(expected.rows, embeds.shape[1], queries)
        if cache is not None:
            self._by_cache[cache] = self._prefill
        if self._prefill is None:
            return None
        kwargs = self._shrink_inputs(self._prefill, dict(kwargs), embeds)
        self._prefill.length = kwargs["inputs_embeds"].shape[1]
        if any(Signal.INPUT_EMBEDDINGS in s.needs for s in self._inside.values()):
            self._prefill.inputs = kwargs["inputs_embeds"]
        return args, kwargs

    def _shrink_inputs(
        self, state: Prefill, kwargs: dict[str, Any], embeds: Tensor
    ) -> dict[str, Any]:
        for reducer in self._before:
            embeds = state.reduce_before(reducer, embeds)
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
            "attention_mask": _masked_to(mask, state.entered, state.entered),
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
            columns = _columns(state.entered, state.full_length, mask.shape[-1])
            kwargs["attention_mask"] = _masked_to(mask, None, columns)
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
                hidden = state.enter_layer(layer, self._inside.get(layer), hidden)
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
                    mask = _masked_to(mask, alive, alive)
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
                mask = _masked_to(mask, None, columns)
            kwargs["attention_mask"] = mask
            if rest is None:
                return args, kwargs | {"hidden_states": hidden}
            return (hidden, *rest), kwargs

        return pre


def _like(index: Tensor, target: Tensor) -> Tensor:
    """index [b, n] with leading axes of 1 until it has as many axes as `target`."""
    return index.view((1,) * (target.ndim - index.ndim) + index.shape)


def _masked_to(mask: Tensor, rows: Tensor | None, columns: Tensor) -> Tensor:
    """A mask [b, m] or [b, h, n, m] of some columns long [b, m'], and of some rows long [b, n']."""
    if mask.ndim == 2:
        return mask.gather(1, columns)
    if rows is not None:
        mask = torch.take_along_dim(mask, rows[:, None, :, None], dim=-2)
    return torch.take_along_dim(mask, columns[:, None, None, :], dim=-1)


def _columns(alive: Tensor, length: int, width: int) -> Tensor:
    """Key columns at a layer: what is alive of the prefill, then every later token."""
    later = torch.arange(length, width, device=alive.device).expand(alive.shape[0], -1)
    return torch.cat([alive, later], dim=1)
