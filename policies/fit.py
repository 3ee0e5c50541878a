"""Do a reducer and a model fit together?"""

from __future__ import annotations

from stream.errors import AttachError
from stream.reducers.base import Reducer
from stream.registry import build_reducer, reducer_names
from stream.signals import Signal


def misfit(
    reducer: Reducer, before: frozenset[Signal], inside: frozenset[Signal], reuses: bool = False
) -> str:
    """What a model lacks for a reducer, "" if nothing.

    before, inside: signals for stages before the language model and inside it. reuses: whether
    the model keeps keys and values from tick to tick.
    """
    lacks = {
        f"{signal} {'inside' if stage.site.in_llm else 'before'} the language model"
        for stage in reducer.stages
        for signal in stage.needs - (inside if stage.site.in_llm else before)
    }
    if not reuses and any(stage.reuses for stage in reducer.stages):
        lacks.add("keys and values of the tick before")
    return ", ".join(sorted(lacks))


def check_fit(
    model: str,
    reducer: Reducer,
    before: frozenset[Signal],
    inside: frozenset[Signal],
    reuses: bool = False,
) -> None:
    """Raise AttachError, with the reducers that do fit, if `misfit` finds something."""
    if lacking := misfit(reducer, before, inside, reuses):
        given = (before, inside, reuses)
        fitting = [n for n in reducer_names() if not misfit(build_reducer(n), *given)]
        raise AttachError(
            f"{model} cannot give {lacking}, which {type(reducer).__name__} needs; "
            f"reducers that fit: {', '.join(fitting)}."
        )
