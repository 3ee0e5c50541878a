"""The slow truth about a pruned run: nothing shrinks, what was dropped is hidden.

The whole sequence runs through every layer with eager attention and original positions. From the
layer of a stage on, dropped tokens are masked as keys for every other token, so their own rows no
longer matter; merged tokens get their new states at the place of their anchor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from stream.data import VisualTokens
from stream.plan import Plan
from stream.reducers.base import Reducer, reduce_batch
from stream.signals import Signal
from tests.policies import tiny_models

NEW = 6
GREEDY = {
    "max_new_tokens": NEW,
    "min_new_tokens": NEW,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
    "pad_token_id": 0,
}
BUILDERS: dict[str, tuple[Callable[[], Any], Callable[..., dict[str, Tensor]]]] = {
    "llava_onevision": (tiny_models.llava_onevision, tiny_models.llava_inputs),
    "qwen2_5_vl": (tiny_models.qwen2_5_vl, tiny_models.qwen_inputs),
}
FAMILIES = sorted(BUILDERS)

Change = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""hidden [n, d] -> (places that stay, their new rows, places that are hidden from now on)"""


@dataclass
class Seen:
    """One stage of an attached run as it happened: what went in and what came out."""

    reducer: Reducer
    tokens: VisualTokens
    plan: Plan
    signals: dict[Signal, Tensor]


@contextmanager
def watching() -> Iterator[list[Seen]]:
    """Every stage that runs inside the block, in order."""
    seen: list[Seen] = []

    def watched(
        reducer: Reducer, tokens: Any, signals: Any, budgets: Any, memories: Any
    ) -> list[Plan]:
        plans = reduce_batch(reducer, tokens, signals, budgets, memories)
        for video, said, plan in zip(tokens, signals, plans, strict=True):
            given = {signal: said[signal].clone() for signal in reducer.needs}
            seen.append(Seen(reducer, video, plan, given))
        return plans

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("policies.prefill.reduce_batch", watched)
        yield seen


def stages_of(seen: list[Seen], slots: Tensor, depth: int) -> dict[int, Change]:
    """What was seen, as changes by layer; slots: places of the one video in its sequence."""
    changes: dict[int, Change] = {}
    for one in seen:
        layer = one.reducer.site.layer_index(depth) if one.reducer.site.in_llm else 0
        changes[layer] = by_plan(slots, one.plan)
        slots = slots[one.plan.anchor]
    return changes


def read_off(signal: Signal, attention: Tensor, alive: Tensor, slots: Tensor) -> Tensor:
    """A signal about `slots` from the whole map [n, n]; alive: long [m], the rows still there."""
    rows = {
        Signal.LAST_ROW: alive[-1:],
        Signal.PREFILL_ROWS: alive,
        Signal.TEXT_ROWS: alive[alive > slots.max()][1:-1],
    }
    return attention[rows[signal]].mean(0)[slots]


def by_plan(slots: Tensor, plan: Plan) -> Change:
    def change(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stay = slots[plan.anchor]
        return stay, plan.apply(hidden[slots]), slots[~torch.isin(slots, stay)]

    return change


@dataclass
class Oracle:
    """Hooks on a model with eager attention. One sequence at a time, or beams of one.

    changes: by layer, what happens at its entry during the prefill. padding: bool [n] of the
    prompt. maps: by layer, the attention of the prefill, mean over heads, [n, n].
    """

    layers: Any
    changes: Mapping[int, Change] = field(default_factory=dict)
    padding: Tensor | None = None
    maps: dict[int, Tensor] = field(default_factory=dict)
    hidden_keys: dict[int, Tensor] = field(default_factory=dict)

    def before(self, layer: int, kwargs: dict[str, Any], x: Tensor) -> Tensor:
        cache = kwargs.get("past_key_values")
        past = cache.layers[layer].get_seq_length() if cache and layer < len(cache.layers) else 0
        new = x.shape[1]
        if past == 0:
            gone = self.hidden_keys.get(layer - 1) if layer else self.padding
            gone = torch.zeros(new, dtype=torch.bool) if gone is None else gone.clone()
            if layer in self.changes:
                x = x.clone()
                for sequence in x:
                    stay, rows, hide = self.changes[layer](sequence)
                    sequence[stay] = rows
                    gone[hide] = True
            self.hidden_keys[layer] = gone
        gone = self.hidden_keys[layer]
        row, key = torch.arange(past, past + new)[:, None], torch.arange(past + new)
        seen = (key <= row) & ~torch.cat([gone, gone.new_zeros(past + new - gone.numel())])
        mask = torch.full(seen.shape, torch.finfo(torch.float32).min)
        mask[seen | (key == row)] = 0
        kwargs["attention_mask"] = mask[None, None]
        return x

    @contextmanager
    def attached(self) -> Iterator[None]:
        def pre(layer: int) -> Any:
            def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                kwargs = dict(kwargs)
                x = args[0] if args else kwargs.pop("hidden_states")
                return (self.before(layer, kwargs, x), *args[1:]), kwargs

            return hook

        def note(layer: int) -> Any:
            def hook(module: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
                self.maps.setdefault(layer, output[1][0].mean(0))

            return hook

        with ExitStack() as stack:
            for i, module in enumerate(self.layers):
                hook = module.register_forward_pre_hook(pre(i), with_kwargs=True)
                stack.callback(hook.remove)
                hook = module.self_attn.register_forward_hook(note(i))
                stack.callback(hook.remove)
            yield


def build(family: str, eager: bool = False) -> Any:
    """The same weights every time."""
    model = BUILDERS[family][0]()
    if eager:
        model.set_attn_implementation("eager")
    return model


def inputs_of(family: str, **sizes: int) -> dict[str, Tensor]:
    return BUILDERS[family][1](**sizes)


def video_slots(inputs: dict[str, Tensor], family: str, row: int = 0) -> Tensor:
    """Places of the video's patches; LLaVA's last placeholder stands for a newline."""
    slots = (inputs["input_ids"][row] == tiny_models.VIDEO_ID).nonzero().squeeze(-1)
    return slots[:-1] if family == "llava_onevision" else slots


def generate(model: Any, inputs: dict[str, Tensor], **settings: Any) -> Any:
    with torch.no_grad():
        return model.generate(**inputs, **(GREEDY | settings))


def apart(a: Any, b: Any) -> float:
    """Largest difference of the logits of two generations."""
    return max(float((x - y).abs().max()) for x, y in zip(a.logits, b.logits, strict=True))


def cache_lengths(output: Any) -> list[int]:
    return [layer.get_seq_length() for layer in output.past_key_values.layers]
