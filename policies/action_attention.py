"""What actions look at: attention that visual tokens receive from the rows that decode actions."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Self

import torch
from torch import Tensor

from .hooks import ReductionHooks
from .probes import Attention, Probe, probing


class ActionAttention:
    """Watches some decoder layers of a pruned model while it decodes actions. A context manager.

        with hooks, ActionAttention(hooks, layers, slice(-1, None)) as looked:
            model.generate(...)
        looked.mean()

    layers: of the decoder, see `Reducer.action_layers`. rows: which rows of every
    forward in the block are actions: `slice(-1, None)` where each forward decodes the next action
    token from its last row, prefill included; `slice(-m, None)` where m slots are decoded at once.
    """

    def __init__(self, hooks: ReductionHooks, layers: range, rows: slice) -> None:
        self._hooks, self._layers, self._rows = hooks, layers, rows
        self._received: dict[int, list[Tensor]] = {}
        self._probing: AbstractContextManager[None]

    def __enter__(self) -> Self:
        modules = (self._hooks.layers[i].get_submodule("self_attn") for i in self._layers)
        probes = (self._probe(layer) for layer in self._layers)
        self._received = {layer: [] for layer in self._layers}
        self._probing = probing(self._hooks.text_model, dict(zip(modules, probes, strict=True)))
        self._probing.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._probing.__exit__(None, None, None)

    def _probe(self, layer: int) -> Probe:
        def probe(attention: Attention) -> None:
            batch, n = attention.query.shape[0], attention.query.shape[2]
            rows = torch.arange(n, device=attention.query.device)[self._rows].expand(batch, -1)
            taken = torch.ones_like(rows, dtype=torch.bool)
            self._received[layer].append(attention.received(rows, taken))

        return probe

    def mean(self) -> list[list[Tensor]]:
        """For each video of each sequence, float32 [grid.size]: mean over heads, action rows and
        layers; 0 where a token was pruned, a merged token's share at its anchor."""
        seen = [
            (self._hooks.rows_at(layer), received)
            for layer in self._layers
            for received in self._received[layer]
        ]
        videos = []
        for i, row in enumerate(self._hooks.rows):
            sums = [torch.zeros(span.grid.size, device=span.slots.device) for span in row]
            for rows, received in seen:
                for total, span in zip(sums, rows[i], strict=True):
                    total.index_add_(0, span.plan.anchor, received[i, span.slots])
            videos.append([total / max(len(seen), 1) for total in sums])
        return videos
