"""The command line. These files declare commands; what they do lives in ../commands/."""

from __future__ import annotations

import sys

from . import ask, bench, check, demos, info, live, robot, speed
from .apps import app

__all__ = ["app", "ask", "bench", "check", "demos", "info", "live", "main", "robot", "speed"]


def main() -> None:
    """Entry point: errors that foveate raises on purpose are one line and exit code 2."""
    from stream.errors import FoveateError

    from ..show import err

    try:
        app(standalone_mode=True)
    except FoveateError as error:
        err.print(f"[bold red]{type(error).__name__}[/]: {error}", highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        err.print("stopped")
        sys.exit(130)
