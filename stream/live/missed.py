"""Why was it missed? What became of the frames around a moment, from a record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stream.data import PatchGrid
from stream.plan import Plan
from stream.sinks.patch_paint import ALONE, DROPPED, Fates


@dataclass(slots=True)
class Fate:
    """What became of one frame that was looked at or gated.

    gated: it looked like the last encoded frame. kept, merged, dropped: its patches. evicted_s:
    when its part left the model's window, in media time. forgotten: the archive let it go too.
    """

    pts_s: float
    gated: bool = False
    group: int | None = None
    kept: int = 0
    merged: int = 0
    dropped: int = 0
    evicted_s: float | None = None
    forgotten: bool = False

    @property
    def said(self) -> str:
        """In words, for a person."""
        if self.gated:
            return "gated: nothing changed since the last encoded frame"
        words = f"{self.kept} patches kept, {self.merged} merged, {self.dropped} left out"
        if self.evicted_s is not None:
            words += f"; left the window at {self.evicted_s:.1f} s"
            words += ", then forgotten" if self.forgotten else ", archived"
        return words


@dataclass(slots=True)
class Story:
    """Everything that a record tells of one stream. missed: (time, frames dropped by the source,
    causes of a gap)."""

    fates: dict[float, Fate] = field(default_factory=dict)
    missed: list[tuple[float, int, tuple[str, ...]]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)

    def saw(self, answer: Mapping[str, Any], at_s: float) -> bool:
        """Whether an answer rests on what the encoder last saw at a moment."""
        shown = [t for t, fate in self.fates.items() if not fate.gated and t <= at_s]
        spans: Sequence[Sequence[float]] = answer["seen_s"]
        return bool(shown) and any(first <= max(shown) <= last for first, last in spans)

    def around(self, at_s: float, within_s: float) -> list[Fate]:
        return [f for t, f in sorted(self.fates.items()) if abs(t - at_s) <= within_s]


def stories(rows: Iterable[Mapping[str, Any]]) -> dict[str, Story]:
    """One story a stream. Rows of kinds it does not know are counted only."""
    told: dict[str, Story] = {}
    for row in rows:
        story = told.setdefault(str(row.get("stream")), Story())
        kind = str(row.get("kind"))
        story.kinds[kind] += 1
        if kind == "gated":
            story.fates[row["pts_s"]] = Fate(row["pts_s"], gated=True)
        elif kind == "part":
            for fate in _fates(row):
                story.fates[fate.pts_s] = fate
        elif kind == "evicted":
            for fate in story.fates.values():
                if fate.group == row["group"]:
                    fate.evicted_s = row["pts_s"]
        elif kind == "forgotten":
            for fate in story.fates.values():
                fate.forgotten |= fate.group == row["group"]
        elif kind == "missed":
            story.missed.append((row["pts_s"], row["dropped"], tuple(row["gap"] or ())))
        elif kind == "answer":
            story.answers.append(dict(row))
    return told


def _fates(row: Mapping[str, Any]) -> list[Fate]:
    grid = PatchGrid(*row["grid"])
    paint = Fates.of(Plan.from_record(row["plan"]), grid).paint.reshape(grid.frames, -1)
    kinds = (paint == ALONE, paint >= 0, paint == DROPPED)
    counts = np.stack([kind.sum(1) for kind in kinds], axis=1).tolist()
    return [Fate(pts_s, False, row["group"], *counts[t]) for t, pts_s in enumerate(row["frames_s"])]
