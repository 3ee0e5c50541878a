"""Exact integer budgets."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import BudgetError


def evenly(total: int, groups: int) -> Tensor:
    """long [groups] that sums to `total`; they differ by at most one, the larger ones spread."""
    edge = torch.arange(groups + 1) * total // groups
    return edge.diff()


def allocate(weight: NDArray[Any], cap: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Share `total` units over groups by weight, never above a group's cap, exactly.

    Each round gives every open group the floor of its share and then single units by largest
    remainder (ties by index); what a cap cuts off is shared again among the others.

    weight: float [g], not negative; cap: long [g]. Returns long [g] that sums to `total`.
    Raises BudgetError if the caps hold less than `total`.
    """
    room = cap.copy()
    if int(room.sum()) < total:
        raise BudgetError(
            f"{total} tokens cannot be shared over groups that hold {int(room.sum())}; "
            "lower the budget."
        )
    heavy = weight.astype(np.float64)
    left = total
    while left > 0:
        open_weight = np.where(room > 0, heavy, 0.0)
        if open_weight.sum() == 0.0:
            open_weight = (room > 0).astype(np.float64)
        share = open_weight * (left / open_weight.sum())
        step = np.minimum(np.floor(share).astype(np.int64), room)
        rest = left - int(step.sum())
        remainder = np.where(room > step, share - step, -1.0)
        lucky = np.argsort(-remainder, kind="stable")[: min(rest, int((room > step).sum()))]
        step[lucky] += 1
        room -= step
        left -= int(step.sum())
    return cap - room
