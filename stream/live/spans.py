"""A span of time that a question names."""

from __future__ import annotations

import re

_TIME = r"(?:\d+:)?\d{1,2}:\d{2}(?:\.\d+)?|\d+(?:\.\d+)?"
_UNIT = r"\s*(s|sec|secs|seconds?|min|mins|minutes?)?\b"
_SPAN = re.compile(
    rf"\b(?:between|from)\s+({_TIME}){_UNIT}\s+(?:and|to|until)\s+({_TIME}){_UNIT}", re.IGNORECASE
)


def span_in(question: str) -> tuple[float, float] | None:
    """Media seconds that a question spells out, such as `between 60 and 90 s`, `from 1:00 to 1:30`
    or `between 1 and 2 minutes`; None where it names no span, or numbers without a unit.
    """
    found = _SPAN.search(question)
    if found is None:
        return None
    first, first_unit, last, last_unit = found.groups()
    if not (last_unit or ":" in first + last):
        return None
    start_s, stop_s = _seconds(first, first_unit or last_unit), _seconds(last, last_unit)
    return (start_s, stop_s) if start_s <= stop_s else None


def _seconds(text: str, unit: str | None) -> float:
    seconds = 0.0
    for part in text.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds * 60 if unit and unit.lower().startswith("min") and ":" not in text else seconds
