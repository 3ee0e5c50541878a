"""Curves as a picture, where matplotlib is at hand."""

from __future__ import annotations

from typing import Any


def figure_of(width_in: float, height_in: float) -> Any:
    """An empty matplotlib Figure, no window. Raises ConfigError where there is no matplotlib."""
    from stream.errors import ConfigError

    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("A picture needs matplotlib; install it or leave --plot out.") from None
    return Figure(figsize=(width_in, height_in), layout="constrained")
