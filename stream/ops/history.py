"""Attention that past steps of one episode paid to each place of the picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SignalError, ValueShapeError

LONGEST = 8


@dataclass(frozen=True, slots=True, eq=False)
class Glance:
    """One past step. A place that had been pruned was not seen, which is not the same as zero.

    value: float32 [n], the attention each place received when it was last seen; 0 if never.
    age_s: float32 [n], how long before this step that was, seconds; inf if never.
    seen: bool [n], whether this step itself saw the place.
    time_s: when this step's pictures were taken, seconds.
    """

    value: Tensor
    age_s: Tensor
    seen: Tensor
    time_s: float

    @classmethod
    def blank(cls, size: int, device: torch.device | str) -> Glance:
        """A step that saw nothing, and nothing before it."""
        value = torch.zeros(size, device=device)
        return cls(value, torch.full_like(value, torch.inf), value.bool(), -math.inf)


def seen(glances: Sequence[Glance]) -> Tensor:
    """float32 [m, n]: 0 where a step did not look, as the released VLA-Pruner has it."""
    value = torch.stack([g.value for g in glances])
    return value.masked_fill_(~torch.stack([g.seen for g in glances]), 0.0)


def imputed(glances: Sequence[Glance], half_life_s: float) -> Tensor:
    """float32 [m, n]: where a step did not look, the value last seen, halved each half-life."""
    value = torch.stack([g.value for g in glances])
    age_s = torch.stack([g.age_s for g in glances])
    return value.mul_(age_s.div_(-half_life_s).exp2_())


@dataclass(frozen=True, slots=True, eq=False)
class AttentionHistory:
    """The last steps of one episode, at most LONGEST, oldest first.

    epoch: number of the episode; pushed: steps taken in since it began.
    """

    epoch: int = 0
    pushed: int = 0
    glances: tuple[Glance, ...] = ()

    def push(
        self, attention: Tensor, index: Tensor, size: int, *, time_s: float, epoch: int
    ) -> AttentionHistory:
        """The history with one more step; a step of an older epoch changes nothing.

        A newer epoch begins a new history: neither values nor ages cross it.

        attention: float [m], what the places `index` (long [m], distinct) of `size` received.
        Raises SignalError for values that are not finite; ValueShapeError if shapes, places, the
        size of the picture or the order of times contradict what was pushed before.
        """
        if epoch < self.epoch:
            return self
        if epoch > self.epoch:
            return AttentionHistory(epoch).push(attention, index, size, time_s=time_s, epoch=epoch)
        attention = attention.detach().float()
        self._check(attention, index, size, time_s)
        if self.glances:
            last = self.glances[-1]
            value, age_s = last.value.clone(), last.age_s + (time_s - last.time_s)
        else:
            value = attention.new_zeros(size)
            age_s = torch.full_like(value, torch.inf)
        value.index_copy_(0, index, attention)
        age_s.index_fill_(0, index, 0.0)
        seen = torch.zeros_like(value, dtype=torch.bool).index_fill_(0, index, True)
        glances = (*self.glances, Glance(value, age_s, seen, time_s))
        return AttentionHistory(epoch, self.pushed + 1, glances[-LONGEST:])

    def _check(self, attention: Tensor, index: Tensor, size: int, time_s: float) -> None:
        if attention.ndim != 1 or attention.shape != index.shape:
            raise ValueShapeError(
                f"Attention of shape {tuple(attention.shape)} for places of shape "
                f"{tuple(index.shape)}; both must be [m]."
            )
        if not math.isfinite(time_s):
            raise ValueShapeError(f"The step's time is {time_s}; it must be finite seconds.")
        if attention.device.type == "cpu" and attention.numel():
            if not bool(torch.isfinite(attention).all()):
                raise SignalError(
                    "The action attention holds NaN or infinite values; the policy's numerics "
                    "broke. Leave this step out of the history, or run it in float32."
                )
            if int(index.min()) < 0 or int(index.max()) >= size:
                raise ValueShapeError(
                    f"Places span {int(index.min())}..{int(index.max())}; allowed is 0..{size - 1}."
                )
        if self.glances:
            last = self.glances[-1]
            if last.value.numel() != size:
                raise ValueShapeError(
                    f"A step over {size} places follows one over {last.value.numel()}; "
                    "begin a new episode when the cameras change."
                )
            if time_s < last.time_s:
                raise ValueShapeError(
                    f"A step of {time_s} s follows one of {last.time_s} s; "
                    "begin a new episode when time restarts."
                )
