"""The arms of flow policies: behind the prefill, all flow steps at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from policies.graphs.capture import GraphPool, Program
from stream.reducers.base import Reducer

from .arms import Arm, EagerArm, FixedArm
from .clock import StageClock
from .flow import FlowSubject
from .flow_lean import LeanExpert

STAGES = (*Arm.first, "denoise")


class FlowEagerArm(EagerArm):
    """Flow steps over the growing cache that the prefill left, launched kernel by kernel."""

    subject: FlowSubject
    first: ClassVar[tuple[str, ...]] = STAGES

    def acting_flops(self, lengths: Sequence[int]) -> dict[str, float]:
        return {"denoise": self.subject.action_flops(lengths)}

    def _acted(self, clock: StageClock, cache: Any) -> Tensor:
        noise = self.subject.noise.expand(self.batch, -1, -1)
        state = self.subject.state.expand(self.batch, -1)
        with clock.stage("denoise"):
            keys, values = zip(*((held.keys, held.values) for held in cache.layers), strict=True)
            self.said = self.subject.actions(noise, state, keys, values)
        return self.said


class FlowFixedArm(FixedArm):
    """All flow steps are one program over the constant cache, and the expert is a lean one."""

    subject: FlowSubject
    first: ClassVar[tuple[str, ...]] = STAGES

    def __init__(
        self,
        subject: FlowSubject,
        reducer: Reducer | None,
        retain: float,
        batch: int,
        pool: GraphPool,
    ) -> None:
        super().__init__(subject, reducer, retain, batch, pool)
        self._noise = subject.noise.expand(batch, -1, -1)
        self._state = subject.state.expand(batch, -1)
        text = self.bucket.before + self.bucket.after
        lengths = [n + text for n in self.layer_tokens]
        lean = LeanExpert(subject)

        def denoise(noise: Tensor, state: Tensor) -> tuple[Tensor]:
            cache = self.decoder.cache
            keys, values = (
                [held[:, :, :n] for held, n in zip(buffers, lengths, strict=True)]
                for buffers in (cache.keys, cache.values)
            )
            return (lean(noise, state, keys, values),)

        self._denoise = Program(pool, f"The flow steps of {subject.name}", denoise)

    def acting_flops(self, lengths: Sequence[int]) -> dict[str, float]:
        return {"denoise": self.subject.action_flops(lengths, once=True)}

    def _acted(self, clock: StageClock) -> Tensor:
        with clock.stage("denoise"):
            (said,) = self._denoise(self._noise, self._state)
        self.said = said.clone()
        return self.said
