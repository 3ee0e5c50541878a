"""Outcomes of episodes as lines of a file, and what may be concluded from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stream.errors import ConfigError, SourceError

Z = 1.959964


Episode = tuple[str, str, int]


class Cell(NamedTuple):
    """What one row of a table is about."""

    mode: str
    budget_ms: float | None
    time_source: str | None
    method: str
    site: str
    keep: float | None


class Outcome(BaseModel):
    """How one episode ended; other keys of a line are ignored.

    method: a reducer with its settings, or a control. keep: share of the visual tokens; None where
    a controller chose by the deadline. site: where tokens are dropped. tokens: mean over the
    inferences. misses: results that were promised in time and came late. model: which one played;
    the training seeds of a model are pooled in a cell, and paired each with itself.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    method: str
    keep: float | None
    site: str
    task: str
    seed: int
    success: bool
    score: Annotated[float, Field(ge=0, le=1)]
    steps: int
    tokens: float
    mode: Literal["waiting", "realtime"]
    budget_ms: float | None = None
    misses: int | None = None
    inferences: int | None = None
    time_source: str | None = None
    model: str = ""

    @property
    def episode(self) -> Episode:
        return self.model, self.task, self.seed

    @property
    def cell(self) -> Cell:
        where = (self.mode, self.budget_ms, self.time_source)
        return Cell(*where, self.method, self.site, self.keep)


def read(paths: Iterable[Path]) -> list[Outcome]:
    """Every outcome, the latest where an episode was played again; a cut last line is left out.

    Raises SourceError for a file that is no such record.
    """
    found: dict[tuple[Cell, Episode], Outcome] = {}
    for path in paths:
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"{path} cannot be read: {error}.") from None
        for number, line in enumerate(text.splitlines(keepends=True), start=1):
            if not line.endswith("\n"):
                continue
            try:
                outcome = Outcome.model_validate_json(line)
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                where = ".".join(map(str, first["loc"])) or "the line"
                raise SourceError(f"{path}, line {number}: {where}: {first['msg']}.") from None
            found[outcome.cell, outcome.episode] = outcome
    return list(found.values())


def mend(path: Path) -> None:
    """Make a file ready to be appended to: half a line that a kill left behind goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        whole = file.read()
        if whole and not whole.endswith(b"\n"):
            file.truncate(whole.rfind(b"\n") + 1)


@dataclass(frozen=True, slots=True)
class Row:
    """A cell in numbers.

    low, high: Wilson's 95 % interval of the success. missed: share of the inferences, None without
    deadlines. against: the site of the baseline that was compared with, its own if that played.
    won, lost: episodes that this cell solved and the baseline did not, and the other way round,
    among the `pairs` both played; p: McNemar's exact test, two-sided.
    """

    cell: Cell
    n: int
    success: float
    low: float
    high: float
    score: float
    steps: float
    tokens: float
    missed: float | None
    against: str | None = None
    pairs: int = 0
    won: int = 0
    lost: int = 0
    p: float | None = None


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a success rate (Wilson, 1927)."""
    if n == 0:
        return 0.0, 1.0
    rate, z2 = successes / n, Z * Z
    middle = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    return max(0.0, min(rate, middle - half)), min(1.0, max(rate, middle + half))


def mcnemar(won: int, lost: int) -> float:
    """Two-sided exact p of McNemar's test: how likely so uneven a split of unequal pairs is."""
    n, least = won + lost, min(won, lost)
    tail = sum(math.comb(n, k) for k in range(least + 1))
    return min(1.0, float(2 * tail / 2**n))


def rows_of(outcomes: Sequence[Outcome], baseline: str | None = None) -> list[Row]:
    """A row for each cell, ordered.

    baseline: METHOD or METHOD@SHARE or METHOD@deadline, compared with at the same mode, budget and
    times; METHOD alone at the same share as well. Raises ConfigError where it never played.
    """
    cells: dict[Cell, dict[Episode, Outcome]] = {}
    for outcome in outcomes:
        cells.setdefault(outcome.cell, {})[outcome.episode] = outcome
    if baseline and not any(_is_baseline(cell, cell, baseline) for cell in cells):
        raise ConfigError(
            f"The baseline {baseline!r} is in none of the cells; there are "
            f"{', '.join(sorted({_name(cell) for cell in cells})) or 'none'}."
        )
    rows = []
    for cell in sorted(cells, key=_order):
        other = _partner(cell, list(cells), baseline) if baseline else None
        row = _row(cell, cells[cell], cells[other] if other else None)
        rows.append(replace(row, against=other.site) if other else row)
    return rows


def _row(
    cell: Cell,
    played: dict[Episode, Outcome],
    base: dict[Episode, Outcome] | None,
) -> Row:
    n, solved = len(played), sum(o.success for o in played.values())
    low, high = wilson(solved, n)
    inferences = sum(o.inferences or 0 for o in played.values())
    row = Row(
        cell=cell,
        n=n,
        success=solved / n,
        low=low,
        high=high,
        score=sum(o.score for o in played.values()) / n,
        steps=sum(o.steps for o in played.values()) / n,
        tokens=sum(o.tokens for o in played.values()) / n,
        missed=sum(o.misses or 0 for o in played.values()) / inferences if inferences else None,
    )
    if base is None:
        return row
    both = played.keys() & base.keys()
    won = sum(played[key].success and not base[key].success for key in both)
    lost = sum(base[key].success and not played[key].success for key in both)
    p = mcnemar(won, lost) if both else None
    return replace(row, pairs=len(both), won=won, lost=lost, p=p)


def _partner(cell: Cell, cells: Sequence[Cell], baseline: str) -> Cell | None:
    """The baseline's cell that this one is compared with; that of the same site, if there is, else
    the one inside the model."""
    fitting = [c for c in cells if c != cell and _is_baseline(c, cell, baseline)]
    return min(
        fitting, key=lambda c: (c.site != cell.site, c.site == "input", c.site), default=None
    )


def _is_baseline(cell: Cell, beside: Cell, baseline: str) -> bool:
    method, at, keep = baseline.partition("@")
    same = cell[:3] == beside[:3] and cell.method == method
    if not at:
        return same and cell.keep == beside.keep
    return same and _name(cell) == f"{method}@{keep}"


def _name(cell: Cell) -> str:
    return f"{cell.method}@{'deadline' if cell.keep is None else f'{cell.keep:g}'}"


def _order(cell: Cell) -> tuple[str, str, float, float, str, str]:
    keep = -2.0 if cell.keep is None else -cell.keep
    return (
        cell.mode,
        cell.time_source or "",
        cell.budget_ms or 0.0,
        keep,
        cell.method,
        cell.site,
    )
