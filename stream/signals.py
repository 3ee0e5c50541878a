"""What a model can tell a reducer about its tokens, read lazily and only if declared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum

import torch
from torch import Tensor

from .errors import SignalError


class Signal(StrEnum):
    """Each signal has one row for each of the n tokens that enter the stage: float32 [n], or
    features [n, d] as the model computes them."""

    SALIENCY = "saliency"
    """Mean attention each patch receives in the last vision layer, pooled like the features."""

    LAST_ROW = "last_row"
    """Attention of the prompt's last row to each token in the layer before the stage, mean over
    heads."""

    PREFILL_ROWS = "prefill_rows"
    """The same, but the mean over all rows of the prompt, visual rows included; a row that comes
    before the token counts as 0."""

    TEXT_ROWS = "text_rows"
    """The same, but the mean over the text rows after the visual tokens, without the first of
    them and the prompt's last row."""

    INPUT_EMBEDDINGS = "input_embeddings"
    """Features [n, d] of the tokens as they entered the language model, before its first layer."""


class Signals:
    """The signals of one tick for one stage.

    Reading a signal that the reducer did not declare, that the model does not give, or that is
    not finite raises SignalError. A value may be a tensor or a function that makes one when it
    is first read.
    """

    def __init__(
        self,
        values: Mapping[Signal, Tensor | Callable[[], Tensor]],
        declared: frozenset[Signal] | None = None,
    ) -> None:
        self._values = dict(values)
        self._declared = declared
        self.read: set[Signal] = set()

    def declared_by(self, needs: frozenset[Signal]) -> Signals:
        """The same signals, readable only as far as `needs` goes."""
        return Signals(self._values, needs)

    def extended(self, values: Mapping[Signal, Tensor]) -> Signals:
        """The same signals and more."""
        return Signals({**self._values, **values}, self._declared)

    def __getitem__(self, signal: Signal) -> Tensor:
        if self._declared is not None and signal not in self._declared:
            raise SignalError(
                f"The reducer reads '{signal}' but declares only "
                f"{', '.join(sorted(self._declared)) or 'no signals'}; add it to `needs`."
            )
        if signal not in self._values:
            raise SignalError(
                f"Signal '{signal}' is not given here; given: "
                f"{', '.join(sorted(self._values)) or 'none'}."
            )
        self.read.add(signal)
        value = self._values[signal]
        if not isinstance(value, Tensor):
            value = self._values[signal] = value()
        if value.device.type == "cpu" and not bool(torch.isfinite(value).all()):
            raise SignalError(
                f"Signal '{signal}' holds NaN or infinite values; the model's numerics broke "
                "before the reducer. Run it in float32 to find where."
            )
        return value.float() if value.ndim == 1 else value
