"""The arms of each kind of subject."""

from __future__ import annotations

from policies.graphs.capture import GraphPool
from stream.reducers.base import Reducer

from .arms import Arm, EagerArm, FixedArm
from .flow import FlowSubject
from .flow_arms import FlowEagerArm, FlowFixedArm
from .subjects import Subject
from .vla import VLASubject
from .vla_arms import VLAEagerArm, VLAFixedArm

_ARMS: dict[type[Subject], tuple[type[EagerArm], type[FixedArm]]] = {
    FlowSubject: (FlowEagerArm, FlowFixedArm),
    VLASubject: (VLAEagerArm, VLAFixedArm),
}
_USUAL = (EagerArm, FixedArm)


def eager_arm(subject: Subject, reducer: Reducer | None, retain: float, batch: int) -> Arm:
    """The stock arm of a subject."""
    return _ARMS.get(type(subject), _USUAL)[0](subject, reducer, retain, batch)


def fixed_arm(
    subject: Subject, reducer: Reducer | None, retain: float, batch: int, pool: GraphPool
) -> FixedArm:
    """The arm of a subject in fixed shapes."""
    return _ARMS.get(type(subject), _USUAL)[1](subject, reducer, retain, batch, pool)
