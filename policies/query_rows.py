"""Which rows of a prompt say what it looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from stream.signals import Signal

ROW_SIGNALS = frozenset({Signal.LAST_ROW, Signal.PREFILL_ROWS, Signal.TEXT_ROWS})


@dataclass(frozen=True, slots=True)
class QueryRows:
    """The rows of a batch of sequences, by what they hold.

    prompt: bool [b, n], True for the rows of the prompt, False for padding and for the slots of
    actions that are decoded in parallel. text: bool [b, n], those of the prompt behind the last
    visual token. tail: the text is among the last `tail` rows of every sequence, however many
    visual tokens leave.
    """

    prompt: Tensor
    text: Tensor
    tail: int

    @classmethod
    def of(cls, prompt: Tensor, last_visual: Tensor, tail: int) -> Self:
        """prompt: bool [b, n]; last_visual: long [b], the place of each last visual token."""
        place = torch.arange(prompt.shape[1], device=prompt.device)
        return cls(prompt, prompt & (place > last_visual[:, None]), tail)

    def at(self, places: Tensor) -> QueryRows:
        """The same of the tokens that are left; places: long [b, k]."""
        return QueryRows(self.prompt.gather(1, places), self.text.gather(1, places), self.tail)

    def behind(self, signal: Signal) -> tuple[Tensor, Tensor]:
        """(rows long [b, r], bool [b, r] which of them count) whose mean attention a signal is.

        A text of one or two rows is taken whole. Where all text stands before the visual tokens
        the prompt's last row speaks for it.
        """
        n, device = self.prompt.shape[1], self.prompt.device
        place = torch.arange(n, device=device)
        last = (place * self.prompt).amax(1, keepdim=True)
        if signal == Signal.LAST_ROW:
            return last, torch.ones_like(last, dtype=torch.bool)
        if signal == Signal.PREFILL_ROWS:
            return place.expand_as(self.prompt), self.prompt
        is_last = place == last
        inner = self.text & (self.text.cumsum(1) > 1) & ~is_last
        for fallback in (self.text, is_last):
            inner = torch.where(inner.any(1, keepdim=True), inner, fallback)
        first = max(n - self.tail - 1, 0)
        return place[first:].expand(len(inner), -1), inner[:, first:]
