"""Fixed shapes of a prompt, and the parts of a model that hold equally many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stream.data import Budget, PatchGrid
from stream.errors import AttachError
from stream.reducers.base import Reducer

from ..hooks import INSIDE

WIDTH_STEP, TEXT_STEP = 256, 32
"""Key widths and lengths of texts are multiples of these, so that few graphs serve all."""


def round_up(n: int, step: int) -> int:
    return -(-n // step) * step


@dataclass(frozen=True, slots=True)
class Bucket:
    """The fixed shape of a prefill and of what follows it.

    before: text places ahead of the video. visual: tokens of the video that enter the model.
    after: places for text behind it. new: tokens that may follow, by `extend` or `step`.
    budget: visual tokens that reducers inside the model may keep.
    grid: of the unreduced video.
    """

    before: int
    visual: int
    after: int
    new: int
    budget: int
    grid: PatchGrid

    @property
    def length(self) -> int:
        return self.before + self.visual + self.after


@dataclass(frozen=True, slots=True)
class Section:
    """Decoder layers first..stop-1, which hold equally many tokens.

    reducer: acts at their entry.
    """

    first: int
    stop: int
    reducer: Reducer | None = None

    @property
    def layers(self) -> range:
        return range(self.first, self.stop)


def sections(stages: Sequence[Reducer], depth: int) -> list[Section]:
    """The layers between which the number of tokens does not change."""
    for stage in stages:
        if not stage.site.in_llm or stage.needs - INSIDE:
            raise AttachError(
                f"{type(stage).__name__} acts at {stage.site} and needs "
                f"{', '.join(sorted(stage.needs))}; a stage of a decoder acts at a layer and reads "
                f"{', '.join(sorted(INSIDE))}."
            )
    acting = sorted(((s.site.layer_index(depth), s) for s in stages), key=lambda pair: pair[0])
    firsts = [0, *(layer for layer, _ in acting)]
    reducers = [None, *(stage for _, stage in acting)]
    stops = [*firsts[1:], depth]
    return [Section(*each) for each in zip(firsts, stops, reducers, strict=True)]


def visual_tokens(parts: Sequence[Section], visual: int, budget: Budget) -> list[int]:
    """Visual tokens in each section of those that enter the first one."""
    counts = [visual]
    for part in parts[1:]:
        assert part.reducer is not None
        counts.append(part.reducer.keeps(counts[-1], budget))
    return counts
