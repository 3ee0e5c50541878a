"""Products of sizes that a GPU likes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

_STEP = 8
"""Rows of 16-bit numbers that are no multiple of this wide take a slow path."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `F.linear`; on CUDA inputs and outputs are filled up with zeros to multiples of 8.

    Of 8 rows, 4096 inputs and 7 outputs that was 99 us as it stood on an H200, in bfloat16.
    """
    out, inside = weight.shape
    rows, columns = (-n % _STEP if x.is_cuda else 0 for n in (out, inside))
    if columns:
        x, weight = F.pad(x, (0, columns)), F.pad(weight, (0, columns))
    if rows:
        weight = F.pad(weight, (0, 0, 0, rows))
        bias = None if bias is None else F.pad(bias, (0, rows))
    return F.linear(x, weight, bias)[..., :out]


class NarrowLinear(nn.Linear):
    """For few outputs: its product is `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
