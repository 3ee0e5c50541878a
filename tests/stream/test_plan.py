"""`Plan` against the dense matrix it stands for."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stream.errors import ValueShapeError
from stream.plan import Plan

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NONE = torch.empty(0, dtype=torch.long)


@st.composite
def plans(draw: st.DrawFn, n: int | None = None) -> Plan:
    """Gathers and merges: rows in any order, entries that repeat, rows that take nothing."""
    n = draw(st.integers(1, 9)) if n is None else n
    k = draw(st.integers(0, n))
    anchor = torch.tensor(draw(st.permutations(range(n)))[:k], dtype=torch.long)
    if draw(st.booleans()):
        return Plan.keep(anchor, n)
    cell = st.tuples(st.integers(0, k - 1), st.integers(0, n - 1), st.integers(-8, 8))
    cells = draw(st.lists(cell, max_size=14)) if k else []
    row, col, quarters = torch.tensor(cells, dtype=torch.long).view(-1, 3).unbind(1)
    return Plan.merge(anchor, row, col, quarters / 4, n)  # exact in float32 in any order


@st.composite
def chains(draw: st.DrawFn, length: int) -> list[Plan]:
    """Plans that follow one another, first to last."""
    chain = [draw(plans())]
    while len(chain) < length:
        chain.append(draw(plans(chain[-1].k)))
    return chain


def features(n: int) -> Tensor:
    """[n, 5] of eighths, exact in bfloat16 too."""
    return torch.randint(-8, 9, (n, 5), generator=torch.Generator().manual_seed(n)) / 8


@given(plans())
def test_dense_is_the_sum_of_the_entries(plan: Plan) -> None:
    expected = torch.zeros(plan.k, plan.n)
    for row, col, weight in zip(*(e.tolist() for e in plan.entries()), strict=True):
        expected[row, col] += weight
    assert torch.equal(plan.dense(), expected)


@given(plans())
def test_apply_is_the_dense_product(plan: Plan) -> None:
    x = features(plan.n)
    assert torch.equal(plan.apply(x), plan.dense() @ x)


@given(plans())
def test_apply_in_bfloat16_keeps_the_dtype_and_is_near(plan: Plan) -> None:
    x = features(plan.n)
    out = plan.apply(x.bfloat16())
    room = (plan.dense().abs() @ x.abs()) * 2**-6
    assert out.dtype == torch.bfloat16
    assert bool(((out.float() - plan.dense() @ x).abs() <= room).all())


@given(plans())
def test_gradients_flow_through_apply(plan: Plan) -> None:
    x = features(plan.n).requires_grad_()
    plan.apply(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, plan.dense().sum(0)[:, None].expand(-1, 5))


@given(chains(2))
def test_composition_is_the_matrix_product(chain: list[Plan]) -> None:
    earlier, later = chain
    both = later @ earlier
    assert torch.equal(both.dense(), later.dense() @ earlier.dense())
    assert torch.equal(both.anchor, earlier.anchor[later.anchor])
    assert (both.k, both.n) == (later.k, earlier.n)
    assert both.is_gather == (later.is_gather and earlier.is_gather)


@given(chains(2))
def test_one_composed_plan_does_what_two_do(chain: list[Plan]) -> None:
    earlier, later = chain
    x = features(earlier.n)
    assert torch.equal((later @ earlier).apply(x), later.apply(earlier.apply(x)))


@given(chains(3))
def test_composition_is_associative(chain: list[Plan]) -> None:
    first, second, third = chain
    assert ((third @ second) @ first).same_as(third @ (second @ first))


@given(plans())
def test_identity_changes_nothing(plan: Plan) -> None:
    x = features(plan.n)
    assert torch.equal(Plan.identity(plan.n).apply(x), x)
    for same in (Plan.identity(plan.k) @ plan, plan @ Plan.identity(plan.n)):
        assert torch.equal(same.dense(), plan.dense())
        assert torch.equal(same.anchor, plan.anchor)


@given(plans())
def test_ascending_sorts_rows_by_anchor(plan: Plan) -> None:
    ordered = plan.ascending()
    order = plan.anchor.argsort()
    assert torch.equal(ordered.anchor, plan.anchor[order])
    assert torch.equal(ordered.dense(), plan.dense()[order])


@given(plans())
def test_owner_is_the_row_of_largest_weight(plan: Plan) -> None:
    plan = Plan.identity(plan.k) @ plan  # one entry for each cell
    expected = []
    for column in plan.dense().abs().T:
        row = int(column.argmax()) if column.numel() else -1
        expected.append(row if row >= 0 and column[row] > 0 else -1)
    assert plan.owner().tolist() == expected


def test_owner_of_equal_shares_is_the_lowest_row() -> None:
    row, col = torch.tensor([0, 1, 2, 2]), torch.tensor([1, 1, 1, 0])
    plan = Plan.merge(torch.arange(3), row, col, torch.tensor([0.25, -0.5, 0.5, 1.0]), 4)
    assert plan.owner().tolist() == [2, 1, -1, -1]


@given(plans())
def test_records_round_trip_through_json(plan: Plan) -> None:
    back = Plan.from_record(json.loads(json.dumps(plan.to_record())))
    assert back.same_as(plan)
    assert back.is_gather == plan.is_gather
    assert torch.equal(back.dense(), plan.dense())


@given(plans(), plans())
def test_same_as_tells_plans_apart(a: Plan, b: Plan) -> None:
    assert a.same_as(a)
    if a.same_as(b):
        assert torch.equal(a.anchor, b.anchor)
        assert torch.allclose(a.dense(), b.dense(), atol=1e-5)
    else:
        assert a.to_record() != b.to_record()


def test_a_tenth_of_a_weight_is_a_difference() -> None:
    def plan(weight: float) -> Plan:
        zero = torch.zeros(1, dtype=torch.long)
        return Plan.merge(zero, zero, zero, torch.tensor([weight]), 2)

    assert not plan(0.5).same_as(plan(0.6))
    assert plan(0.5).same_as(plan(0.5 + 1e-7))


def test_a_plan_may_leave_nothing() -> None:
    for none in (Plan.keep(NONE, 4), Plan.merge(NONE, NONE, NONE, NONE.float(), 4)):
        assert none.apply(features(4)).shape == (0, 5)
        assert none.dense().shape == (0, 4)
        assert none.owner().tolist() == [-1] * 4
        assert (Plan.identity(0) @ none).apply(features(4)).shape == (0, 5)
        assert (none @ Plan.identity(4)).n == 4
        assert none.ascending().k == 0


def test_merge_sorts_entries_by_row_and_keeps_their_order_inside() -> None:
    row, col = torch.tensor([1, 0, 1, 0]), torch.tensor([2, 1, 0, 3])
    plan = Plan.merge(torch.tensor([3, 0]), row, col, torch.tensor([1.0, 2.0, 3.0, 4.0]), 4)
    assert [e.tolist() for e in plan.entries()] == [
        [0, 0, 1, 1],
        [1, 3, 2, 0],
        [2.0, 4.0, 1.0, 3.0],
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"anchor": torch.tensor([0.0])}, r"anchor is torch.float32 \(1,\); it must be long \[k\]"),
        ({"anchor": torch.tensor([[0]])}, r"anchor is torch.int64 \(1, 1\); it must be long"),
        ({"anchor": torch.tensor([0, 3])}, r"anchor spans 0\.\.3; allowed is 0\.\.2"),
        ({"anchor": torch.tensor([0, -1])}, r"anchor spans -1\.\.0; allowed is 0\.\.2"),
        ({"col": None}, "row, col and weight come together or not at all"),
        ({"weight": None}, "row, col and weight come together or not at all"),
        ({"weight": torch.ones(3)}, r"differ in length: row \(2,\), col \(2,\), weight \(3,\)"),
        ({"row": torch.tensor([1, 0])}, "row must ascend; build merges with Plan.merge"),
        ({"row": torch.tensor([0, 2])}, r"row spans 0\.\.2; allowed is 0\.\.1"),
        ({"col": torch.tensor([0, 3])}, r"col spans 0\.\.3; allowed is 0\.\.2"),
        ({"col": torch.tensor([-1, 0])}, r"col spans -1\.\.0; allowed is 0\.\.2"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "anchor": torch.tensor([0, 2]),
        "n": 3,
        "row": torch.tensor([0, 1]),
        "col": torch.tensor([1, 2]),
        "weight": torch.tensor([0.5, 0.5]),
    }
    assert Plan(**good).k == 2
    with pytest.raises(ValueShapeError, match=message):
        Plan(**(good | fields))


def test_misfits_are_refused() -> None:
    with pytest.raises(ValueShapeError, match=r"Plan of 3 inputs applied to \(4, 5\)"):
        Plan.identity(3).apply(features(4))
    with pytest.raises(ValueShapeError, match=r"applied to \(1, 3, 5\)"):
        Plan.identity(3).apply(features(3)[None])
    with pytest.raises(ValueShapeError, match="later one takes 3 tokens, the earlier one gives 2"):
        Plan.identity(3) @ Plan.identity(2)


def test_it_is_frozen_and_prints_shapes() -> None:
    plan = Plan.identity(5)
    with pytest.raises(AttributeError):
        plan.n = 6  # type: ignore[misc]
    assert repr(plan) == "Plan(5 -> 5, gather)"
    row = torch.zeros(5, dtype=torch.long)
    merged = Plan.merge(row[:1], row, torch.arange(5), torch.full((5,), 0.2), 5)
    assert repr(merged) == "Plan(5 -> 1, merge, 5 entries)"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_larger_plan_on_a_device(device: str, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    n, k, entries = 512, 64, 900
    anchor = torch.randperm(n, generator=draw)[:k]
    row = torch.randint(k, (entries,), generator=draw)
    col = torch.randint(n, (entries,), generator=draw)
    weight = torch.rand(entries, generator=draw)
    plan = Plan.merge(anchor, row, col, weight, n)
    x = torch.randn(n, 48, generator=draw)
    out = plan.to(device).apply(x.to(device, dtype))
    again = (Plan.identity(k).to(device) @ plan.to(device)).ascending()
    assert out.dtype == dtype
    assert out.device.type == device
    tolerance = 1e-5 if dtype == torch.float32 else 0.15
    assert torch.allclose(out.cpu().float(), plan.dense() @ x, atol=tolerance)
    assert torch.allclose(again.dense().cpu(), plan.dense()[anchor.argsort()], atol=1e-6)
    assert torch.equal(plan.to(device).owner().cpu(), plan.owner())
