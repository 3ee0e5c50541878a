"""A `with` block closes, also after an error, which it does not swallow."""

from __future__ import annotations

import pytest

from stream.closing import Closing


class Door(Closing):
    closed = False

    def close(self) -> None:
        self.closed = True


def test_a_block_closes() -> None:
    with Door() as door:
        assert not door.closed
    assert door.closed


def test_an_error_closes_and_goes_on() -> None:
    door = Door()
    with pytest.raises(KeyError), door:
        raise KeyError
    assert door.closed


def test_what_cannot_be_closed_cannot_be_made() -> None:
    with pytest.raises(TypeError):
        Closing()  # type: ignore[abstract]
