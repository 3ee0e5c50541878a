"""The arms of OpenVLA-shaped networks: behind the prefill, a pass over the rows of actions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from policies.graphs.capture import GraphPool, Program
from stream.reducers.base import Reducer

from .arms import Arm, EagerArm, FixedArm
from .clock import StageClock
from .flops import decoder_flops
from .vla import VLASubject

ACT = "action_head"
STAGES = (*Arm.first, ACT)


class VLAEagerArm(EagerArm):
    """One more pass over the growing cache that the prefill left."""

    subject: VLASubject
    first: ClassVar[tuple[str, ...]] = STAGES

    def acting_flops(self, lengths: Sequence[int]) -> dict[str, float]:
        return _flops(self.subject, lengths)

    def _acted(self, clock: StageClock, cache: Any) -> Tensor:
        subject, prompt = self.subject, self.subject.prompt
        with clock.stage(ACT):
            rows = subject.rows(subject.state.expand(self.batch, -1))
            more = torch.arange(1, prompt.behind + 1, device=rows.device)
            ids = (self.positions[..., -1:] + more).expand(self.batch, -1)
            hidden = self._forward(cache, ids, rows)
            self.said = subject.head(hidden[:, -prompt.slots :])
        return self.said


class VLAFixedArm(FixedArm):
    """The same over the constant cache."""

    subject: VLASubject
    first: ClassVar[tuple[str, ...]] = STAGES

    def __init__(
        self,
        subject: VLASubject,
        reducer: Reducer | None,
        retain: float,
        batch: int,
        pool: GraphPool,
    ) -> None:
        super().__init__(subject, reducer, retain, batch, pool)
        self._state = subject.state.expand(batch, -1)
        name = f"The rows of actions of {subject.name}"
        self._rows = Program(pool, name, lambda state: (subject.rows(state),))
        self._counts = torch.full_like(self._lengths, subject.prompt.behind)

    def acting_flops(self, lengths: Sequence[int]) -> dict[str, float]:
        return _flops(self.subject, lengths)

    def _acted(self, clock: StageClock) -> Tensor:
        decoder = self.decoder
        with clock.stage(ACT):
            (rows,) = self._rows(self._state)
            said = decoder.extend(decoder.widths(self.bucket), rows, self._counts)
        self.said = said.clone()
        return self.said


def _flops(subject: VLASubject, lengths: Sequence[int]) -> dict[str, float]:
    behind = [subject.prompt.behind] * len(lengths)
    return {ACT: decoder_flops(subject.text_model, behind, lengths) + subject.rows_flops()}
