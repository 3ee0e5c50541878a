"""What reducers do in fixed shapes is captured once for each shape."""

from __future__ import annotations

import torch
from torch import Tensor

from policies.graphs.replays import KEPT, Replays
from stream.ops.replayed import replayable

from .taped import TapedPool


def shifted(by: int, x: Tensor) -> tuple[Tensor]:
    return (x + by,)


def test_each_key_and_shape_is_one_program_whose_results_stay() -> None:
    replays, pool = Replays(), TapedPool("cpu")
    said = []
    with replays.on(pool):
        for by in (1, 2, 1):
            for n in (2, 3):
                x = torch.full((n,), float(len(said)))
                said.append(replayable(by, lambda x, by=by: shifted(by, x), x)[0])
    assert [one.tolist() for one in said] == [
        [i + by] * n for i, (by, n) in enumerate((by, n) for by in (1, 2, 1) for n in (2, 3))
    ]
    assert pool.captured == 4


def test_types_are_told_apart_and_few_are_kept() -> None:
    replays, pool = Replays(), TapedPool("cpu")
    with replays.on(pool):
        for kind in (torch.float32, torch.long):
            replayable("one", lambda x: (x * 2,), torch.ones(1, dtype=kind))
        assert pool.captured == 2
        for n in range(KEPT + 1):
            replayable("many", lambda x: (x * 2,), torch.ones(n + 1))
    assert len(replays.programs) == KEPT
