"""lerobot's pi0: the state is a token of the expert, so an old prefix can take in a newer one."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from .pi import PiFamily


class Family(PiFamily):
    state_in_prefix: ClassVar[bool] = False

    def beside(self, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        return (self.policy.prepare_state(batch),)

    def velocity(
        self, noisy: Tensor, time: Tensor, padding: Tensor, cache: Any, *beside: Tensor
    ) -> Tensor:
        (state,) = beside
        v: Tensor = self.model.denoise_step(
            state=state, prefix_pad_masks=padding, past_key_values=cache, x_t=noisy, timestep=time
        )
        return v
