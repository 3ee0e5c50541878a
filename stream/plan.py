"""`Plan`: what became of every token, as one sparse linear map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ValueShapeError


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A k x n map from the tokens that entered a stage to the tokens that leave it.

    anchor: long [k], the input index that lends its position to each output row.
    n: number of input tokens.
    row, col, weight: the entries of the matrix, sorted by row ([e] long, long, float32); all
        None when the plan is a pure gather of the anchors.

    Dropping, averaging over time and merging are all such maps, so plans compose: `later @
    earlier` says what the later stage made of the earlier stage's inputs.
    """

    anchor: Tensor
    n: int
    row: Tensor | None = None
    col: Tensor | None = None
    weight: Tensor | None = None

    def __post_init__(self) -> None:
        if self.anchor.ndim != 1 or self.anchor.dtype != torch.long:
            raise ValueShapeError(
                f"Plan.anchor is {self.anchor.dtype} {tuple(self.anchor.shape)}; "
                "it must be long [k]."
            )
        entries = (self.row, self.col, self.weight)
        if any(e is None for e in entries) and any(e is not None for e in entries):
            raise ValueShapeError("Plan.row, col and weight come together or not at all.")
        if self.row is not None and self.col is not None and self.weight is not None:
            if not (self.row.shape == self.col.shape == self.weight.shape):
                raise ValueShapeError(
                    f"Plan entries differ in length: row {tuple(self.row.shape)}, "
                    f"col {tuple(self.col.shape)}, weight {tuple(self.weight.shape)}."
                )
            if self.row.device.type == "cpu" and self.row.numel():
                if bool((self.row.diff() < 0).any()):
                    raise ValueShapeError("Plan.row must ascend; build merges with Plan.merge.")
                self._check_range("col", self.col, self.n)
                self._check_range("row", self.row, self.k)
        if self.anchor.device.type == "cpu" and self.anchor.numel():
            self._check_range("anchor", self.anchor, self.n)

    @staticmethod
    def _check_range(name: str, index: Tensor, limit: int) -> None:
        low, high = (int(end) for end in index.aminmax())
        if low < 0 or high >= limit:
            raise ValueShapeError(f"Plan.{name} spans {low}..{high}; allowed is 0..{limit - 1}.")

    @classmethod
    def identity(cls, n: int, device: torch.device | str = "cpu") -> Plan:
        return cls(torch.arange(n, device=device), n)

    @classmethod
    def keep(cls, index: Tensor, n: int) -> Plan:
        """Gather `index` (long [k]) in the order given; everything else is dropped."""
        return cls(index, n)

    @classmethod
    def merge(cls, anchor: Tensor, row: Tensor, col: Tensor, weight: Tensor, n: int) -> Plan:
        """Weighted sums: output `row[e]` receives `weight[e]` times input `col[e]`, any order."""
        order = torch.argsort(row, stable=True)
        return cls(anchor, n, row[order], col[order], weight[order].float())

    @classmethod
    def joined(cls, plans: Sequence[Plan]) -> Plan:
        """Plans over consecutive inputs as one plan over all of them."""
        firsts = accumulate([p.n for p in plans], initial=0)
        shifted = [(p, first) for p, first in zip(plans, firsts, strict=False)]
        n = sum(p.n for p in plans)
        anchor = torch.cat([p.anchor + first for p, first in shifted])
        if all(p.is_gather for p in plans):
            return cls(anchor, n)
        rows = accumulate([p.k for p in plans], initial=0)
        entries = [p.entries() for p in plans]
        row = torch.cat([e[0] + k for e, k in zip(entries, rows, strict=False)])
        col = torch.cat([e[1] + first for e, (_, first) in zip(entries, shifted, strict=True)])
        return cls(anchor, n, row, col, torch.cat([e[2] for e in entries]))

    @property
    def k(self) -> int:
        return self.anchor.shape[0]

    @property
    def is_gather(self) -> bool:
        return self.row is None

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """(row, col, weight) of the matrix, spelled out also for a pure gather."""
        if self.row is None or self.col is None or self.weight is None:
            ones = torch.ones(self.k, device=self.anchor.device)
            return torch.arange(self.k, device=self.anchor.device), self.anchor, ones
        return self.row, self.col, self.weight

    def _row_start(self) -> Tensor:
        """long [k]: where each row's entries begin."""
        row, _, _ = self.entries()
        return torch.searchsorted(row, torch.arange(self.k, device=row.device))

    def apply(self, x: Tensor) -> Tensor:
        """x [n, d] -> [k, d]; the only place where tensors shrink."""
        if x.ndim != 2 or x.shape[0] != self.n:
            raise ValueShapeError(f"Plan of {self.n} inputs applied to {tuple(x.shape)}.")
        if self.is_gather:
            return x.index_select(0, self.anchor)
        _, col, weight = self.entries()
        return weighted_sums(x, col, self._row_start(), weight)

    def __matmul__(self, earlier: Plan) -> Plan:
        """self after `earlier`, as one plan over the inputs of `earlier`."""
        if self.n != earlier.k:
            raise ValueShapeError(
                f"Plans do not compose: the later one takes {self.n} tokens, "
                f"the earlier one gives {earlier.k}."
            )
        anchor = earlier.anchor[self.anchor]
        if self.is_gather and earlier.is_gather:
            return Plan(anchor, earlier.n)
        row2, col2, weight2 = self.entries()
        row1, col1, weight1 = earlier.entries()
        start = earlier._row_start()
        count = torch.bincount(row1, minlength=earlier.k)[col2]
        outer = torch.repeat_interleave(count)
        inner = torch.arange(outer.numel(), device=outer.device)
        inner = inner - (count.cumsum(0) - count)[outer] + start[col2][outer]
        cell, slot = torch.unique(row2[outer] * earlier.n + col1[inner], return_inverse=True)
        weight = torch.zeros(cell.shape, device=cell.device)
        weight.index_add_(0, slot, weight2[outer] * weight1[inner])
        return Plan(anchor, earlier.n, cell // earlier.n, cell % earlier.n, weight)

    def among(self, places: Tensor) -> Plan:
        """The same rows over the inputs at `places` (long [m]) alone, which hold all it reads."""
        rank = torch.empty(self.n, dtype=torch.long, device=places.device)
        rank[places] = torch.arange(places.numel(), device=places.device)
        if self.row is None or self.col is None:
            return Plan(rank[self.anchor], places.numel())
        return Plan(rank[self.anchor], places.numel(), self.row, rank[self.col], self.weight)

    def ascending(self) -> Plan:
        """The same rows, ordered by their anchors."""
        order = torch.argsort(self.anchor, stable=True)
        return Plan.keep(order, self.k) @ self

    def dense(self) -> Tensor:
        """float32 [k, n], for tests and small pictures."""
        row, col, weight = self.entries()
        full = torch.zeros(self.k, self.n, device=row.device)
        return full.index_put_((row, col), weight, accumulate=True)

    def owner(self) -> Tensor:
        """long [n]: the output row each input contributes most to, -1 where it was dropped.

        Equal contributions go to the lowest row.
        """
        row, col, weight = self.entries()
        best = torch.zeros(self.n, device=row.device).scatter_reduce_(0, col, weight.abs(), "amax")
        holds = (weight.abs() == best[col]) & (weight != 0)
        owner = torch.full((self.n,), self.k, device=row.device, dtype=torch.long)
        owner.scatter_reduce_(0, col[holds], row[holds], "amin")
        return torch.where(owner == self.k, -1, owner)

    def to(self, device: torch.device | str) -> Plan:
        moved = [None if t is None else t.to(device) for t in (self.row, self.col, self.weight)]
        return Plan(self.anchor.to(device), self.n, *moved)

    def same_as(self, other: Plan) -> bool:
        """Equal anchors and entries (weights within 1e-6)."""
        if self.n != other.n or not torch.equal(self.anchor, other.anchor):
            return False
        (row, col, weight), (row_o, col_o, weight_o) = self.entries(), other.entries()
        return (
            torch.equal(row, row_o)
            and torch.equal(col, col_o)
            and torch.allclose(weight, weight_o, atol=1e-6)
        )

    def to_record(self) -> dict[str, Any]:
        """Plain lists for a JSON record; `from_record` reads it back."""
        record: dict[str, Any] = {"n": self.n, "anchor": self.anchor.tolist()}
        if self.row is not None and self.col is not None and self.weight is not None:
            record |= {
                "row": self.row.tolist(),
                "col": self.col.tolist(),
                "weight": self.weight.tolist(),
            }
        return record

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Plan:
        anchor = torch.tensor(record["anchor"], dtype=torch.long)
        if "row" not in record:
            return cls(anchor, record["n"])
        return cls(
            anchor,
            record["n"],
            torch.tensor(record["row"], dtype=torch.long),
            torch.tensor(record["col"], dtype=torch.long),
            torch.tensor(record["weight"], dtype=torch.float32),
        )

    def __repr__(self) -> str:
        kind = "gather" if self.is_gather else f"merge, {self.entries()[0].numel()} entries"
        return f"Plan({self.n} -> {self.k}, {kind})"


def weighted_sums(x: Tensor, col: Tensor, start: Tensor, weight: Tensor) -> Tensor:
    """Rows of which each sums `weight[e] * x[col[e]]` from its entry `start` on up to the next's.

    x: [n, d]; col, weight: [e]; start: long [k], ascending. Returns [k, d]. `embedding_bag` reads
    each input row once and needs no n x d temporary.
    """
    return F.embedding_bag(col, x, start, mode="sum", per_sample_weights=weight.to(x.dtype))
