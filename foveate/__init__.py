"""foveate keeps the visual tokens that matter, over time, and drops or merges the rest."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "attach": "policies.attach",
    "Budget": "stream.data",
    "Frame": "stream.data",
    "PatchGrid": "stream.data",
    "Segment": "stream.data",
    "Step": "stream.data",
    "VisualTokens": "stream.data",
    "Plan": "stream.plan",
    "Memory": "stream.memory",
    "Signal": "stream.signals",
    "Signals": "stream.signals",
    "Reducer": "stream.reducers.base",
    "Site": "stream.reducers.base",
    "build_reducer": "stream.registry",
    "check_reducer": "stream.check",
    "open_source": "stream.sources",
    "FoveateError": "stream.errors",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'foveate' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
