"""Do a reducer and a model fit together?"""

from __future__ import annotations

from stream.errors import AttachError
from stream.reducers.base import Reducer
from stream.registry import build_reducer, reducer_names
from stream.signals import Signal


def check_fit(
    model: str, reducer: Reducer, before: frozenset[Signal], inside: frozenset[Signal]
) -> None:
    """Raise AttachError if a stage needs a signal that the model does not give where it acts.

    before, inside: what there is for stages before the language model and inside it.
    """

    def missing(candidate: Reducer) -> frozenset[Signal]:
        lacks = (s.needs - (inside if s.site.in_llm else before) for s in candidate.stages)
        return frozenset().union(*lacks)

    if lacking := missing(reducer):
        fitting = [n for n in reducer_names() if not missing(build_reducer(n))]
        raise AttachError(
            f"{model} cannot give {', '.join(sorted(lacking))} where {type(reducer).__name__} "
            f"needs it; reducers that fit: {', '.join(fitting)}."
        )
