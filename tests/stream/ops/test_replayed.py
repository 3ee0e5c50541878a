"""What is replayable runs as it stands, or as whoever runs a reducer wants it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from stream.ops.replayed import Work, replayable, replaying


def double(x: Tensor) -> tuple[Tensor]:
    return (x * 2,)


class Noting:
    def __init__(self) -> None:
        self.keys: list[Hashable] = []

    def __call__(self, key: Hashable, work: Work, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        self.keys.append(key)
        return work(*tensors)


def twice(x: Tensor) -> tuple[Tensor, ...]:
    return replayable("part", double, *double(x))


def test_nobody_replays_unless_asked() -> None:
    noting, x = Noting(), torch.ones(2)
    with replaying(noting):
        assert replayable("one", double, x)[0].tolist() == [2.0, 2.0]
    assert replayable("two", double, x)[0].tolist() == [2.0, 2.0]
    assert noting.keys == ["one"]


def test_a_whole_is_replayed_and_not_its_parts() -> None:
    noting = Noting()
    with replaying(noting):
        assert replayable("whole", twice, torch.ones(1))[0].tolist() == [4.0]
        assert twice(torch.ones(1))[0].tolist() == [4.0]
    assert noting.keys == ["whole", "part"]


def test_the_inner_one_replays_and_the_outer_one_comes_back_after_errors() -> None:
    outer, inner = Noting(), Noting()

    def fails(x: Tensor) -> tuple[Tensor]:
        raise ValueError

    with replaying(outer):
        with pytest.raises(ValueError), replaying(inner):  # noqa: PT011
            replayable("inner", fails, torch.ones(1))
        replayable("outer", double, torch.ones(1))
    assert (outer.keys, inner.keys) == (["outer"], ["inner"])


def test_other_threads_do_not_see_it() -> None:
    noting = Noting()
    with replaying(noting), ThreadPoolExecutor(1) as thread:
        said = thread.submit(replayable, "there", double, torch.ones(1)).result()
    assert said[0].tolist() == [2.0]
    assert noting.keys == []
