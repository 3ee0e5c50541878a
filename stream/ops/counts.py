"""Exact integer budgets."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BudgetError


def evenly(total: int, groups: int) -> Tensor:
    """long [groups] that sums to `total`; they differ by at most one, the larger ones spread."""
    edge = torch.arange(groups + 1) * total // groups
    return edge.diff()


def allocate(weight: Tensor, cap: Tensor, total: int) -> Tensor:
    """Share `total` units over groups by weight, never above a group's cap, exactly.

    Each round gives every open group the floor of its share and then single units by largest
    remainder (ties by index); what a cap cuts off is shared again among the others.

    weight: float [g], not negative; cap: long [g]. Returns long [g] that sums to `total`.
    Raises BudgetError if the caps hold less than `total`.
    """
    if int(cap.sum()) < total:
        raise BudgetError(
            f"{total} tokens cannot be shared over groups that hold {int(cap.sum())}; "
            "lower the budget."
        )
    given = torch.zeros_like(cap)
    left = total
    while left > 0:
        room = cap - given
        open_weight = torch.where(room > 0, weight.double(), 0.0)
        if float(open_weight.sum()) == 0.0:
            open_weight = (room > 0).double()
        share = open_weight * (left / float(open_weight.sum()))
        step = torch.minimum(share.floor().long(), room)
        rest = left - int(step.sum())
        remainder = torch.where(room > step, share - step, -1.0)
        lucky = torch.sort(remainder, descending=True, stable=True).indices
        lucky = lucky[: min(rest, int((room > step).sum()))]
        step[lucky] += 1
        given += step
        left = total - int(given.sum())
    return given
