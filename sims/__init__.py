"""Simulator episodes: environments, demonstrations, and the clock that does not wait."""

from __future__ import annotations

from .base import Environment, EnvironmentSpec, StepResult

__all__ = ["Environment", "EnvironmentSpec", "StepResult", "make", "names"]


def names() -> tuple[str, ...]:
    """All environments that `make` knows; imports no simulator."""
    from .tasks import TASKS

    return (*(f"metaworld:{task}" for task in TASKS), "pusht")


def make(name: str) -> Environment:
    """An environment by name, such as metaworld:drawer-open or pusht.

    Raises UnknownNameError with the nearest names, SimulatorError where the simulator cannot run.
    """
    from stream.registry import suggest

    if name not in names():
        raise suggest("environment", name, names())
    if name == "pusht":
        from .pusht import PushT

        return PushT()
    from .metaworld import MetaWorld

    return MetaWorld(name.removeprefix("metaworld:"))
