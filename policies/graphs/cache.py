"""KV buffers allocated once, written in place; layers may hold different numbers of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


class StaticCache:
    """What transformers' decoder layers need of a cache: `update`.

    Each layer holds [b, heads, capacity of the layer, d] keys and values. Before a pass over new
    tokens call `begin` or `append`.

    keeps: whether first tokens are stored: not where nothing follows them.
    """

    keeps = True

    def __init__(
        self,
        capacities: Sequence[int],
        batch: int,
        heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        runs = [(capacity, len(list(run))) for capacity, run in groupby(capacities)]
        self._blocks = [
            torch.zeros(2, layers, batch, heads, capacity, head_size, dtype=dtype, device=device)
            for capacity, layers in runs
        ]
        self.keys: list[Tensor] = [keys for block in self._blocks for keys in block[0]]
        self.values: list[Tensor] = [values for block in self._blocks for values in block[1]]
        self._places: Sequence[Tensor] | None = None
        self._widths: Sequence[int] = ()

    @property
    def bytes(self) -> int:
        return 2 * sum(k.numel() * k.element_size() for k in self.keys)

    def first(self, layers: range, n: int) -> Tensor:
        """Keys and values of the first n places of layers of one capacity, a view
        [2, layers, b, heads, n, d]."""
        begins = 0
        for block in self._blocks:
            at = layers.start - begins
            if at < block.shape[1]:
                break
            begins += block.shape[1]
        return block[:, at : at + len(layers), :, :, :n]

    def begin(self) -> None:
        """The next tokens are the first ones."""
        self._places = None

    def append(self, places: Sequence[Tensor], widths: Sequence[int]) -> None:
        """The next tokens go to `places` (long [b, new]) of each layer, and see `widths` places."""
        self._places, self._widths = places, widths

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values [b, heads, new, d]; return what the new tokens may look at."""
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        if self._places is None:
            if self.keeps:
                keys[:, :, : key.shape[2]] = key
                values[:, :, : key.shape[2]] = value
            return key, value
        at = self._places[layer_idx][:, None, :, None].expand_as(key)
        width = self._widths[layer_idx]
        keys.scatter_(2, at, key)
        values.scatter_(2, at, value)
        return keys[:, :, :width], values[:, :, :width]


def heads_of(config: Any) -> tuple[int, int]:
    """Heads of keys and values, and the size of each."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_key_value_heads), int(size)


def place_bytes(text_model: PreTrainedModel) -> int:
    """What one place of one layer takes."""
    heads, size = heads_of(text_model.config)
    return 2 * heads * size * next(text_model.parameters()).element_size()
