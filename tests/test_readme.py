"""The generated parts of the README are fresh, and its commands exist."""

from __future__ import annotations

import re

from typer.testing import CliRunner

from foveate.cli import app
from foveate.readme import README, rendered


def test_generated_parts_are_fresh() -> None:
    text = README.read_text()
    assert rendered(text) == text, "run: python -m foveate.readme"


def test_every_command_named_is_there() -> None:
    named = set(
        re.findall(
            r"`foveate ([a-z]+(?: (?:golden|reducer|inputs|quality|merge))?)", README.read_text()
        )
    )
    assert {"ask", "demo", "methods", "doctor"} <= named
    for words in named:
        result = CliRunner().invoke(app, [*words.split(), "--help"])
        assert result.exit_code == 0, words
