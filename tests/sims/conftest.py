"""Pictures need EGL and GL; a machine without them skips, unless FOVEATE_REQUIRE_GL=1."""

from __future__ import annotations

import os
from functools import cache

import pytest

import sims
from stream.errors import SimulatorError


@cache
def _why_not() -> str:
    try:
        with sims.make("metaworld:reach") as env:
            env.reset(0)
            env.observe()
    except SimulatorError as error:
        return str(error)
    return ""


@pytest.fixture
def pictures() -> None:
    if _why_not() and os.environ.get("FOVEATE_REQUIRE_GL") != "1":
        pytest.skip(_why_not())
