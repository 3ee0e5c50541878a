"""A card for the tests of budgets: an affine device with noise, quantiles computed exactly."""

from __future__ import annotations

from stream.budgets.simulate import AFFINE_MS, BUCKETS
from stream.budgets.simulate import affine_card as card

__all__ = ["AFFINE_MS", "BUCKETS", "card"]
