"""Kernels that a machine may be unable to build: tried once, done without where they cannot be."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType


def built(run: Callable[[], ModuleType], without: str) -> ModuleType | None:
    """The module that `run` imports and tries; None, after a warning, where that fails.

    without: what happens instead, as the beginning of a sentence.
    """
    try:
        return run()
    except Exception as error:  # no Triton, no C compiler, no folder to write to: all are bearable
        warnings.warn(f"{without}, since their kernels cannot be built: {error}", stacklevel=3)
        return None
