"""Names -> classes, found by file name: `stream/reducers/holitom.py` is the reducer 'holitom'."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from typing import Any

from .errors import UnknownNameError
from .reducers.base import Reducer


def suggest(kind: str, given: str, known: Iterable[str]) -> UnknownNameError:
    """The error for a name that does not exist, with the nearest ones."""
    known = sorted(known)
    near = difflib.get_close_matches(given, known, n=2, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return UnknownNameError(f"Unknown {kind} '{given}'.{hint} Known: {', '.join(known)}.")


def reducer_names() -> tuple[str, ...]:
    """All reducers, sorted; imports none of them."""
    package = importlib.import_module("stream.reducers")
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "base"))


def reducer_class(name: str) -> type[Reducer]:
    """The one public Reducer class that the file of this name defines; '-' reads as '_'."""
    stem = name.replace("-", "_")
    if stem not in reducer_names():
        raise suggest("reducer", name, reducer_names())
    module = importlib.import_module(f"stream.reducers.{stem}")
    found = [
        cls
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, Reducer) and cls.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise UnknownNameError(
            f"stream/reducers/{stem}.py defines {len(found)} reducers; it must define exactly one."
        )
    return found[0]


def build_reducer(name: str, **settings: Any) -> Reducer:
    """A reducer by name with its hyper-parameters; unknown ones raise with the known names."""
    return reducer_class(name).build(**settings)
