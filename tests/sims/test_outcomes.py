"""Lines, intervals and tests of significance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sims.controls import Blank
from sims.outcomes import Outcome, mcnemar, mend, read, rows_of, wilson
from stream.errors import ConfigError, SourceError
from tests.sims.toys import ToyWorld


def outcome(method: str, seed: int, success: bool, **more: Any) -> Outcome:
    fields = {
        "method": method, "keep": 0.25, "site": "2", "task": "reach", "seed": seed,
        "success": success, "score": 0.5, "steps": 40, "tokens": 128, "mode": "waiting",
    }  # fmt: skip
    return Outcome(**fields | more)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table 1
        (15, 148, 0.0624, 0.1605),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


@pytest.mark.parametrize(
    ("won", "lost", "p"), [(0, 0, 1.0), (5, 5, 1.0), (0, 5, 0.0625), (10, 1, 0.01171875)]
)
def test_mcnemar(won: int, lost: int, p: float) -> None:
    assert mcnemar(won, lost) == pytest.approx(p)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_a_probability_and_even(won: int, lost: int) -> None:
    assert 0 < mcnemar(won, lost) <= 1
    assert mcnemar(won, lost) == mcnemar(lost, won)


def test_models_are_pooled_and_paired_each_with_itself() -> None:
    played = [outcome("a", s, success=True, model=m) for s in range(4) for m in "xy"]
    played += [outcome("b", s, success=m == "x", model=m) for s in range(4) for m in "xyz"]
    a, b = rows_of(played, baseline="b")
    assert (a.n, a.success, a.pairs, a.won, a.lost) == (8, 1.0, 8, 4, 0)
    assert b.n == 12


def test_the_partner_has_the_same_site_or_stands_inside_the_model() -> None:
    sites = ["input", "layer 3"]
    played = [outcome("b", 0, success=True, site=site) for site in sites]
    played += [outcome("a", 0, success=True, site=site) for site in [*sites, "layer 2"]]
    rows = [row for row in rows_of(played, "b") if row.cell.method == "a"]
    against = {row.cell.site: row.against for row in rows}
    assert against == {"input": "input", "layer 3": "layer 3", "layer 2": "layer 3"}


def test_pairs_share_task_and_seed() -> None:
    played = [outcome("a", s, success=s < 6) for s in range(10)]
    played += [outcome("b", s, success=s % 2 == 0) for s in range(2, 20)]
    a, b = rows_of(played, baseline="b")
    assert (a.n, a.success, a.pairs, a.won, a.lost) == (10, 0.6, 8, 2, 2)
    assert a.p == 1.0
    assert (b.n, b.p) == (18, None)
    assert a.low < 0.6 < a.high


def test_a_baseline_at_its_share_or_at_the_same() -> None:
    solved = {("a", 1.0): 9, ("a", 0.25): 5, ("b", 1.0): 9, ("b", 0.25): 2}
    played = [outcome(m, s, s < n, keep=k) for (m, k), n in solved.items() for s in range(10)]
    same = {r.cell.method + f"{r.cell.keep:g}": (r.won, r.lost) for r in rows_of(played, "a")}
    assert (same["b1"], same["b0.25"]) == ((0, 0), (0, 3))
    full = {r.cell.method + f"{r.cell.keep:g}": (r.won, r.lost) for r in rows_of(played, "a@1")}
    assert (full["b0.25"], full["a0.25"]) == ((0, 7), (0, 4))
    with pytest.raises(ConfigError, match=r"'c' is in none of the cells; there are a@0\.25, a@1"):
        rows_of(played, "c")


def test_the_site_compared_with_is_said() -> None:
    played = [outcome("b", 0, True, site=site) for site in ("input", "layer 3")]
    played += [outcome("a", 0, True, site=site) for site in ("input", "layer 3")]
    rows = {(r.cell.method, r.cell.site): r.against for r in rows_of(played, baseline="b")}
    assert rows == {
        ("a", "input"): "input",
        ("a", "layer 3"): "layer 3",
        ("b", "input"): "layer 3",
        ("b", "layer 3"): "input",
    }


def test_budgets_are_compared_at_the_same_budget() -> None:
    timed = {"mode": "realtime", "time_source": "stated: 60 ms", "misses": 1, "inferences": 10}
    played = [
        outcome("a", s, s < n, budget_ms=budget, keep=keep, **timed)
        for budget, keep, n in ((40.0, None, 8), (40.0, 1.0, 1), (80.0, None, 9), (80.0, 1.0, 9))
        for s in range(10)
    ]
    rows = rows_of(played, "a@1")
    assert [(r.cell.budget_ms, r.cell.keep, r.won, r.lost) for r in rows] == [
        (40, None, 7, 0), (40, 1, 0, 0), (80, None, 0, 0), (80, 1, 0, 0),
    ]  # fmt: skip
    assert rows[0].missed == pytest.approx(0.1)


def test_lines_are_read_back_and_the_latest_counts(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    first, second = outcome("a", 1, False), outcome("a", 1, True)
    lines = [json.dumps({**o.model_dump(), "more": 1}) for o in (first, second)]
    file.write_text("\n".join(lines) + "\n" + lines[0][:20])
    assert read([file]) == [second]
    mend(file)
    assert file.read_text() == "\n".join(lines) + "\n"
    mend(tmp_path / "new" / "lines.jsonl")
    assert read([tmp_path / "new" / "lines.jsonl"]) == []


def test_wrong_lines_are_named(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text(json.dumps(outcome("a", 1, True).model_dump()) + '\n{"method": "a"}\n')
    with pytest.raises(SourceError, match="line 2: keep: Field required"):
        read([file])
    with pytest.raises(SourceError, match="cannot be read"):
        read([tmp_path / "nowhere.jsonl"])


def test_blank_pictures_hide_the_world_and_nothing_else() -> None:
    plain, world = ToyWorld(dark={1}), ToyWorld(dark={1})
    blank = Blank(world)
    assert blank.reset(3) == plain.reset(3)
    seen = blank.observe()
    assert all((i == 128).all() for i in seen.images.values() if i is not None)
    assert (seen.state == plain.observe().state).all()
    action = plain.expert()
    assert blank.step(action) == plain.step(action)
    assert blank.observe().images == dict.fromkeys(("top", "back"))
    assert (blank.hold(None) == plain.hold(None)).all()
    assert blank.spec == plain.spec
