"""What one worker is given and what it gives back: all questions about one video at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from .manifest import Row

Cached = Literal["hit", "new", "failed"]


@dataclass(frozen=True, slots=True)
class VideoJob:
    """A video and its prompts, in the manifest's order."""

    path: str
    prompts: tuple[str, ...]

    @property
    def key(self) -> str:
        """Names the job in a journal: the same video and prompts have the same key."""
        text = json.dumps([self.path, self.prompts])
        return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a job; plain data for a journal.

    answers: (text, confidence) for each prompt; empty when there is an error.
    fault: whose the error is: the video's, or that of the workers who died on it.
    tokens_in, tokens_out: visual tokens before reduction and at the model's door;
    layer_tokens: mean over decoder layers and questions. cached: what the token cache did.
    note: what of the video could not be read. ms: wall time by stage.
    """

    key: str
    answers: tuple[tuple[str, float], ...] = ()
    error: str | None = None
    fault: Literal["video", "worker"] | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    layer_tokens: float = 0.0
    frames: int = 0
    cached: Cached = "new"
    note: str = ""
    ms: dict[str, float] = field(default_factory=dict)

    def to_record(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """Raises TypeError, KeyError or ValueError for what no `to_record` wrote."""
        answers = tuple((str(text), float(p)) for text, p in record["answers"])
        return cls(**record | {"answers": answers})


def group(rows: Iterable[Row]) -> dict[VideoJob, tuple[Row, ...]]:
    """One job for each video, in the order in which the manifest first names them."""
    by_path: dict[str, list[Row]] = {}
    for row in rows:
        by_path.setdefault(row.path, []).append(row)
    return {
        VideoJob(path, tuple(r.prompt for r in group)): tuple(group)
        for path, group in by_path.items()
    }
