"""Cells of a coarser picture: exact in number, equal in size where that divides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stream.data import Budget, PatchGrid, VisualTokens
from stream.errors import ConfigError
from stream.memory import Memory
from stream.plan import Plan
from stream.reducers.base import reduce_stage
from stream.reducers.low_resolution import LowResolution, cells
from stream.signals import Signals


def pooled(grid: PatchGrid, x: torch.Tensor, k: int) -> Plan:
    tokens = VisualTokens.full(x, grid, tuple(float(t) for t in range(grid.frames)))
    return reduce_stage(LowResolution(), tokens, Signals({}), Budget(k), Memory())


@pytest.mark.parametrize(("grid", "k", "stride"), [((2, 4, 6), 12, 2), ((3, 9, 9), 27, 3)])
def test_exact_divisors_are_average_pooling(
    grid: tuple[int, int, int], k: int, stride: int
) -> None:
    shape = PatchGrid(*grid)
    x = torch.randn(shape.size, 5, generator=torch.Generator().manual_seed(0))
    plan = pooled(shape, x, k)
    maps = x.view(*grid, 5).permute(0, 3, 1, 2)
    expected = torch.nn.functional.avg_pool2d(maps, stride).permute(0, 2, 3, 1).reshape(-1, 5)
    assert torch.allclose(plan.apply(x), expected, atol=1e-6)


def test_five_cells_of_a_grid_of_four_by_four() -> None:
    """Two rows of cells, of two and of three columns; each cell stands at its middle patch."""
    cell, middle = cells(PatchGrid(1, 4, 4), 5)
    assert cell.view(4, 4).tolist() == [
        [0, 0, 1, 1],
        [0, 0, 1, 1],
        [2, 2, 3, 4],
        [2, 2, 3, 4],
    ]
    assert middle.nonzero().flatten().tolist() == [0, 2, 8, 10, 11]


def test_fewer_cells_than_cameras_leave_some_without() -> None:
    cell, _ = cells(PatchGrid(3, 1, 2), 2)
    assert cell.tolist() == [-1, -1, 0, 0, 1, 1]


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 400))
def test_every_patch_of_a_frame_counts_once(frames: int, rows: int, cols: int, k: int) -> None:
    grid = PatchGrid(frames, rows, cols)
    k = min(k, grid.size)
    cell, middle = cells(grid, k)
    assert cell[cell >= 0].unique().tolist() == list(range(k))
    assert cell[middle].tolist() == list(range(k))
    sizes = torch.bincount(cell[cell >= 0], minlength=k)
    per_frame = (cell.view(frames, -1) >= 0).all(1)
    assert int(sizes.sum()) == int(per_frame.sum()) * grid.per_frame
    for c in range(min(k, 20)):
        _, y, x = (cell.view(frames, rows, cols) == c).nonzero(as_tuple=True)
        assert len(y) == (int(y.max() - y.min()) + 1) * (int(x.max() - x.min()) + 1)


def test_partial_grids_are_refused() -> None:
    tokens = VisualTokens(torch.ones(3, 2), torch.tensor([0, 1, 3]), PatchGrid(1, 2, 2), (0.0,))
    with pytest.raises(ConfigError, match="LowResolution reads whole frames, but got 3 of 4"):
        reduce_stage(LowResolution(), tokens, Signals({}), Budget(2), Memory())
