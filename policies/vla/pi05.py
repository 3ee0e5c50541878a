"""lerobot's pi05: the state is part of the instruction, and time modulates the expert's norms."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from .pi import PiFamily


class Family(PiFamily):
    state_in_prefix: ClassVar[bool] = True

    def velocity(
        self, noisy: Tensor, time: Tensor, padding: Tensor, cache: Any, *beside: Tensor
    ) -> Tensor:
        v: Tensor = self.model.denoise_step(
            prefix_pad_masks=padding, past_key_values=cache, x_t=noisy, timestep=time
        )
        return v
