"""VLA-Pruner against its reference, against its laws, and in an episode."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stream.check import check_reducer
from stream.data import Budget, PatchGrid, VisualTokens
from stream.errors import ConfigError, SignalError, ValueShapeError
from stream.golden import Case, check_folder
from stream.memory import Memory
from stream.ops import picks, spread
from stream.ops.history import LONGEST, AttentionHistory, imputed, seen
from stream.reducers.base import INPUT, reduce_batch, reduce_stage
from stream.reducers.vla_pruner import (
    SIGNAL_OF,
    STATE,
    Semantic,
    VLAPruner,
    begin_episode,
    query_rows,
    remember,
)
from stream.signals import Signal, Signals

FOLDER = Path(__file__).resolve().parent.parent / "goldens" / "vla_pruner"
PASSES = {"functions.npz": 8, "full_attention.npz": 203, "seq0.npz": 841}
GRID = PatchGrid(1, 8, 8)
SEED = st.integers(0, 2**31)
MODES: tuple[Any, ...] = ("default", "paper", "released")


# --- the reference


@pytest.mark.parametrize("name", sorted(PASSES))
def test_all_stable_steps_match_the_reference(name: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to(FOLDER / name)
    cases = check_folder(tmp_path)[name]
    assert [case for case in cases if case.verdict == "failed"] == []
    assert Counter(case.verdict for case in cases)["passed"] >= PASSES[name]


def test_no_golden_file_goes_unchecked() -> None:
    assert {path.name for path in FOLDER.glob("*.npz")} == set(PASSES)


def check_changed(folder: Path, name: str, keys: tuple[str, ...], **changes: Any) -> list[Case]:
    """The cases of a file that holds only some arrays, of which some are changed."""
    with np.load(FOLDER / name) as stored:
        arrays = {key: stored[key] for key in keys} | changes
    np.savez(folder / name, allow_pickle=False, **arrays)
    return check_folder(folder)[name]


STEPS = "vp_recency_f32_last_closed_k64"
ARRAYS = (
    *("params", "visual", "att_last", "action_vectors", "guide_recency_f32_closed_k64"),
    *(f"{STEPS}_{field}" for field in ("mask", "union", "pick", "stable", "tie")),
    "base_last_k64_mask",
)


def test_the_undamaged_part_passes(tmp_path: Path) -> None:
    cases = check_changed(tmp_path, "seq0.npz", ARRAYS)
    assert Counter(case.verdict for case in cases) == {"passed": 1 + 1 + 12 + 1}


@pytest.mark.parametrize(
    ("key", "step", "failing"),
    [
        (f"{STEPS}_mask", 7, f"{STEPS} step 7"),
        (f"{STEPS}_mask", 0, f"{STEPS} step 0"),
        (f"{STEPS}_union", 7, f"{STEPS} step 7"),
        (f"{STEPS}_pick", 7, f"{STEPS} step 7"),
        ("guide_recency_f32_closed_k64", 7, "guide_recency_f32_closed_k64"),
        ("base_last_k64_mask", 7, "base_last_k64"),
    ],
)
def test_one_wrong_value_fails_its_case(key: str, step: int, failing: str, tmp_path: Path) -> None:
    with np.load(FOLDER / "seq0.npz") as stored:
        array = stored[key].copy()
    if key.endswith("mask"):
        row = array[step]
        kept, gone = np.flatnonzero(row), np.flatnonzero(row == 0)
        row[kept[0]] = 0
        row[gone[:1]] = 1
    else:
        array[step] = array[step] * 1.01 if array.dtype.kind == "f" else np.roll(array[step], 1) + 1
    cases = check_changed(tmp_path, "seq0.npz", ARRAYS, **{key: array})
    assert failing in {case.name for case in cases if case.verdict == "failed"}


def test_tied_steps_are_skipped_but_not_unseen(tmp_path: Path) -> None:
    name = "vp_released_bf16_last_open_k32"
    keys = (*ARRAYS[:4], *(f"{name}_{f}" for f in ("mask", "union", "pick", "stable", "tie")))
    with np.load(FOLDER / "seq0.npz") as stored:
        mask, tie = stored[f"{name}_mask"].copy(), stored[f"{name}_tie"]
    tied = int(np.flatnonzero(tie)[0])
    (case,) = (
        c for c in check_changed(tmp_path, "seq0.npz", keys) if c.name == f"{name} step {tied}"
    )
    assert case.verdict == "skipped"
    mask[tied] = 0
    mask[tied, :32] = 1
    cases = check_changed(tmp_path, "seq0.npz", keys, **{f"{name}_mask": mask})
    (case,) = (c for c in cases if c.name == f"{name} step {tied}")
    assert case.verdict == "failed"
    assert "valid union" in case.why


def test_wrong_picks_scores_and_missing_arrays_fail(tmp_path: Path) -> None:
    red = tuple(f"red00_{f}" for f in ("x", "keep", "picks", "stable", "n_distinct"))
    with np.load(FOLDER / "functions.npz") as stored:
        rolled = np.roll(stored["red00_picks"], 1)
    (case,) = check_changed(tmp_path, "functions.npz", red, red00_picks=rolled)
    assert case.verdict == "failed"
    (case,) = check_changed(tmp_path, "functions.npz", red[:-1])
    assert (case.verdict, "n_distinct" in case.why) == ("failed", True)
    maps = ("attention_heads", "layout", "att_last", "att_prefill", "att_text")
    maps += ("action_attention", "action_vectors")
    with np.load(FOLDER / "full_attention.npz") as stored:
        wrong = stored["att_text"] * (1 + 1e-4)
    cases = check_changed(tmp_path, "full_attention.npz", maps, att_text=wrong)
    assert [c.name for c in cases if c.verdict == "failed"] == ["scores text"]


# --- the contract


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", [3, None])
def test_contract(mode: str, layer: int | None) -> None:
    assert check_reducer("vla_pruner", mode=mode, layer=layer, semantic="last") == []


def test_default_contract_and_needs() -> None:
    assert check_reducer("vla_pruner") == []
    assert VLAPruner.needs == VLAPruner().needs == {Signal.TEXT_ROWS, Signal.INPUT_EMBEDDINGS}
    assert VLAPruner(layer=None, semantic="prefill").needs == {Signal.PREFILL_ROWS}
    assert VLAPruner(layer=None).site == INPUT
    with pytest.raises(ConfigError, match="window"):
        VLAPruner.build(window=LONGEST + 1)


def test_which_layers_and_rows() -> None:
    assert list(VLAPruner(mode="released").action_layers(32)) == [15]
    assert list(VLAPruner(mode="paper").action_layers(32)) == list(range(16, 32))
    rows = list(range(277))
    assert rows[query_rows("last", 257, 277)] == [276]
    assert rows[query_rows("prefill", 257, 277)] == rows
    assert rows[query_rows("text", 257, 277)] == list(range(258, 276))
    assert rows[:259][query_rows("text", 257, 259)] == [257, 258]


# --- farthest picks and even sets


def leads(x: Tensor, chosen: list[int]) -> list[float]:
    """For each pick, by how much it beats the best other choice."""
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    distance = 1 - unit @ unit.T
    found = []
    for rank, pick in enumerate(chosen):
        away = distance + torch.eye(len(x)) * 9 if rank == 0 else distance[chosen[:rank]]
        nearest = away.amin(0)
        nearest[chosen[:rank]] = -9
        others = torch.cat([nearest[:pick], nearest[pick + 1 :]]).sort(descending=True).values
        found.append(float(nearest[pick] - others[0]))
    return found


@given(SEED, st.integers(2, 40), st.data())
def test_farthest_picks(seed: int, n: int, data: st.DataObject) -> None:
    """Each pick is the best left; a longer run begins with the shorter one; order is no matter."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 12, generator=draw)
    k = data.draw(st.integers(1, n))
    everything = torch.ones(1, n, dtype=torch.bool)
    chosen = spread.farthest(x[None], everything, k)[0]
    lead = leads(x, chosen.tolist())
    assert min(lead) > -1e-6
    assert torch.equal(spread.farthest(x[None], everything, n)[0, :k], chosen)
    order = torch.randperm(n, generator=draw)
    if min(lead) > 1e-6:
        assert torch.equal(order[spread.farthest(x[order][None], everything, k)[0]], chosen)


@given(SEED, st.integers(1, 20), st.integers(1, 25))
def test_farthest_picks_in_groups_never_repeat(seed: int, n: int, k: int) -> None:
    """Duplicated and zero rows too; invalid points are never picked; spent groups end in -1."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(-1, 2, (3, n, 2), generator=draw).float()
    valid = torch.rand(3, n, generator=draw) < 0.6
    for row, allowed in zip(spread.farthest(x, valid, k), valid, strict=True):
        count = min(int(allowed.sum()), k)
        chosen, rest = row[:count], row[count:]
        assert chosen.unique().numel() == count
        assert bool(allowed[chosen].all())
        assert bool((rest == -1).all())


def test_ties_of_the_filter_go_to_the_lowest_index() -> None:
    x = torch.ones(1, 6, 3)
    assert spread.farthest(x, torch.ones(1, 6, dtype=torch.bool), 4).tolist() == [[0, 1, 2, 3]]


@given(st.integers(4, 64), st.floats(0, 1))
def test_even_sets_favour_no_half_row_or_column(k: int, phase: float) -> None:
    kept = picks.top(spread.even(16, 16, phase), k)
    row, col = kept // 16, kept % 16
    for half in (row < 8, col < 8):
        assert abs(int(half.sum()) - k / 2) <= 3
    assert max(torch.bincount(row).max(), torch.bincount(col).max()) <= k / 16 + 3.5


# --- history


def test_a_value_not_seen_again_is_halved_each_half_life_not_zeroed() -> None:
    history = AttentionHistory().push(
        torch.tensor([4.0, 8.0]), torch.tensor([0, 1]), 3, time_s=1.0, epoch=0
    )
    history = history.push(torch.tensor([6.0]), torch.tensor([0]), 3, time_s=1.5, epoch=0)
    last = history.glances[-1]
    assert imputed([last], 0.5).tolist() == [[6.0, 4.0, 0.0]]
    assert seen([last]).tolist() == [[6.0, 0.0, 0.0]]
    assert last.age_s.tolist() == [0.0, 0.5, float("inf")]


def test_weights_of_past_steps_newest_first() -> None:
    ages = [0.1, 0.6, 1.1]
    assert VLAPruner(mode="released").weights(ages) == pytest.approx([0.64, 0.8, 1.0])
    assert VLAPruner(mode="paper").weights(ages) == pytest.approx([0.8, 0.64, 0.512])
    by_age = VLAPruner(half_life_s=0.5).weights(ages)
    assert by_age[1] / by_age[0] == pytest.approx(0.5)
    assert by_age[2] / by_age[1] == pytest.approx(0.5)


def test_only_the_last_steps_are_held() -> None:
    history = AttentionHistory()
    for t in range(3 * LONGEST):
        history = history.push(torch.ones(4), torch.arange(4), 4, time_s=t, epoch=0)
    assert (len(history.glances), history.pushed) == (LONGEST, 3 * LONGEST)


@pytest.mark.parametrize(
    ("attention", "index", "size", "time_s", "error", "why"),
    [
        ([1.0, float("nan")], [0, 1], 4, 1.0, SignalError, "action attention"),
        ([1.0], [0, 1], 4, 1.0, ValueShapeError, r"\[m\]"),
        ([1.0], [4], 4, 1.0, ValueShapeError, "0..3"),
        ([1.0], [-1], 4, 1.0, ValueShapeError, "0..3"),
        ([1.0], [0], 5, 1.0, ValueShapeError, "cameras change"),
        ([1.0], [0], 4, -1.0, ValueShapeError, "time restarts"),
        ([1.0], [0], 4, float("nan"), ValueShapeError, "finite"),
    ],
)
def test_wrong_steps_are_refused(
    attention: list[float],
    index: list[int],
    size: int,
    time_s: float,
    error: type[Exception],
    why: str,
) -> None:
    history = AttentionHistory().push(torch.ones(4), torch.arange(4), 4, time_s=0, epoch=0)
    with pytest.raises(error, match=why):
        history.push(torch.tensor(attention), torch.tensor(index), size, time_s=time_s, epoch=0)


# --- an episode


def scene(
    seed: int, grid: PatchGrid = GRID, present: Tensor | None = None, time_s: float = 0.0
) -> tuple[VisualTokens, Signals]:
    """Random tokens of a tick and their signals. present: long [n], places that have a token."""
    draw = torch.Generator().manual_seed(seed)
    index = torch.arange(grid.size) if present is None else present
    values = {s: torch.rand(grid.size, generator=draw)[index] for s in SIGNAL_OF.values()}
    x = torch.randn(grid.size, 6, generator=draw)[index]
    tokens = VisualTokens(x, index, grid, (time_s,) * grid.frames)
    return tokens, Signals(values | {Signal.INPUT_EMBEDDINGS: x})


def candidates(
    method: VLAPruner, tokens: VisualTokens, score: Tensor, history: AttentionHistory, k: int
) -> tuple[Tensor, Tensor]:
    """(bool [g, p], long [g]) of one stream."""
    union, count = method.candidates(
        tokens.index[None], score[None], [history], [max(tokens.pts_s)], tokens.grid, k
    )
    return union[0], count[0]


def guide_of(method: VLAPruner, history: AttentionHistory, now_s: float, grid: PatchGrid) -> Tensor:
    """float32 [grid.size] of one stream."""
    return method.guide([history], [now_s], grid, "cpu")[0]


def step(
    method: VLAPruner,
    memory: Memory,
    seed: int,
    k: int,
    grid: PatchGrid = GRID,
    present: Tensor | None = None,
    dt_s: float = 0.1,
) -> Tensor:
    """One closed-loop step: prune, act, remember. Returns the places kept."""
    time_s = memory.tick * dt_s
    tokens, signals = scene(seed, grid, present, time_s)
    kept = tokens.index[reduce_stage(method, tokens, signals, Budget(k), memory).anchor]
    draw = torch.Generator().manual_seed(seed + 1)
    looked = torch.rand(grid.size, generator=draw)[kept]
    remember(memory, looked, kept, grid, time_s=time_s, epoch=memory.state[STATE].epoch)
    memory.tick += 1
    return kept


def episode(epoch: int = 0) -> Memory:
    memory = Memory()
    begin_episode(memory, epoch)
    return memory


@settings(max_examples=40)
@given(
    SEED,
    st.sampled_from(MODES),
    st.sampled_from(["last", "prefill", "text"]),
    st.integers(1, 3),
    st.integers(1, 40),
    st.booleans(),
)
def test_budgets_are_exact_and_kept_tokens_come_from_the_union(
    seed: int, mode: Any, semantic: Semantic, cameras: int, k: int, partial: bool
) -> None:
    grid = PatchGrid(cameras, 4, 5)
    method = VLAPruner(mode=mode, semantic=semantic, refresh_every=3, reach=1)
    memory = episode()
    draw = torch.Generator().manual_seed(seed)
    for tick in range(6):
        present = torch.arange(grid.size)
        if partial:
            present = present[torch.rand(grid.size, generator=draw) < 0.7]
        if not present.numel():
            continue
        tokens, signals = scene(seed + tick, grid, present, memory.tick * 0.1)
        history = memory.state[STATE]
        warming_up = mode != "default" and len(history.glances) < method.window
        kept = step(method, memory, seed + tick, k, grid, present)
        fits = present.numel() <= k
        assert kept.numel() == (present.numel() if fits or warming_up else k)
        assert bool((kept.diff() > 0).all())
        if fits or warming_up:
            continue
        score = signals[SIGNAL_OF[semantic]]
        union, count = candidates(method, tokens, score, history, k)
        assert int(count.sum()) == k
        assert bool(union.flatten()[kept].all())
        assert k <= int(union.sum()) <= 2 * k
        if mode != "default":
            guide = guide_of(method, history, memory.tick * 0.1, grid)
            tops = (present[picks.top(s, k)].tolist() for s in (score, guide[present]))
            assert set(union.flatten().nonzero()[:, 0].tolist()) == set().union(*tops)


@pytest.mark.parametrize("mode", MODES)
def test_only_the_published_modes_warm_up_unpruned(mode: Any) -> None:
    memory = episode()
    counts = [step(VLAPruner(mode=mode, semantic="last"), memory, t, 9).numel() for t in range(5)]
    assert counts == ([9] * 5 if mode == "default" else [64] * 3 + [9] * 2)


def test_the_first_step_keeps_the_semantic_top_set() -> None:
    tokens, signals = scene(3)
    plan = reduce_stage(VLAPruner(reach=1), tokens, signals, Budget(9), episode())
    assert torch.equal(plan.anchor, picks.top(signals[Signal.TEXT_ROWS], 9))


def test_stale_action_attention_is_not_used() -> None:
    method, memory = VLAPruner(stale_s=2.0), episode()
    remember(memory, torch.rand(64), torch.arange(64), GRID, time_s=0.0, epoch=0)
    fresh, late = (guide_of(method, memory.state[STATE], now_s, GRID) for now_s in (2.0, 2.1))
    assert float(fresh.sum()) == pytest.approx(1)
    assert not late.any()


def test_what_the_actions_look_at_is_kept_against_semantics() -> None:
    """Two distinct regions: the prompt looks at one, the actions at the other."""
    looked_at = torch.zeros(64)
    looked_at[40:44] = 1.0
    tokens, signals = scene(5)
    score = torch.zeros(64)
    score[:8] = 1.0
    x = torch.eye(64)
    signals = Signals({Signal.TEXT_ROWS: score, Signal.INPUT_EMBEDDINGS: x})
    memory = episode()
    remember(memory, looked_at, torch.arange(64), GRID, time_s=0.0, epoch=0)
    method = VLAPruner(reach=1)
    union, _ = candidates(method, tokens, score, memory.state[STATE], 8)
    assert union[0].nonzero()[:, 0].tolist() == [*range(8), *range(40, 44)]
    assert reduce_stage(method, tokens, signals, Budget(8), memory).k == 8


def test_a_wider_reach_widens_the_top_sets_and_keeps_the_budget() -> None:
    tokens, signals = scene(1)
    sizes = []
    for reach in (1, 2, 4):
        method, memory = VLAPruner(reach=reach), episode()
        remember(memory, torch.rand(64), torch.arange(64), GRID, time_s=0.0, epoch=0)
        score = signals[Signal.TEXT_ROWS]
        union, count = candidates(method, tokens, score, memory.state[STATE], 8)
        assert reduce_stage(method, tokens, signals, Budget(8), memory).k == int(count.sum()) == 8
        sizes.append(int(union.sum()))
    assert 8 <= sizes[0] < sizes[1] < sizes[2] <= 64


def test_a_refresh_sees_again_what_was_forgotten() -> None:
    """The prompt always looks at the same corner; without refresh the rest is never seen."""

    def seen_after(refresh_every: int | None) -> int:
        method = VLAPruner(refresh_every=refresh_every, reach=1)
        memory, seen = episode(), set()
        score = torch.arange(64.0).flip(0)
        for tick in range(24):
            tokens, signals = scene(tick, time_s=tick * 0.1)
            signals = Signals(
                {Signal.TEXT_ROWS: score, Signal.INPUT_EMBEDDINGS: signals[Signal.INPUT_EMBEDDINGS]}
            )
            kept = reduce_stage(method, tokens, signals, Budget(8), memory).anchor
            remember(memory, score[kept], kept, GRID, time_s=tick * 0.1, epoch=0)
            seen |= set(kept.tolist())
        return len(seen)

    assert seen_after(None) == 8
    assert seen_after(4) > 20


@given(SEED, st.integers(2, 4), st.integers(4, 60), st.floats(0, 1), st.integers(0, 2))
def test_every_camera_keeps_its_floor(
    seed: int, cameras: int, k: int, floor: float, past: int
) -> None:
    """Even one that nobody looks at; a missing camera's share goes to the others."""
    grid = PatchGrid(cameras, 4, 4)
    method, memory = VLAPruner(camera_floor=floor, refresh_every=None), episode()
    missing = seed % cameras if k < (cameras - 1) * 16 else None
    place = torch.arange(grid.size)
    present = place[place // 16 != missing] if missing is not None else place
    for tick in range(past):
        looked = torch.rand(grid.size, generator=torch.Generator().manual_seed(seed + tick))
        remember(memory, looked * (place >= 16), place, grid, time_s=float(tick), epoch=0)
    tokens, signals = scene(seed, grid, present, float(past))
    score = signals[Signal.TEXT_ROWS] * (present >= 16)
    values = {Signal.TEXT_ROWS: score, Signal.INPUT_EMBEDDINGS: signals[Signal.INPUT_EMBEDDINGS]}
    plan = reduce_stage(method, tokens, Signals(values), Budget(k), memory)
    kept = torch.bincount(present[plan.anchor] // 16, minlength=cameras)
    assert int(kept.sum()) == min(k, present.numel())
    least = min(int(floor * min(k, present.numel()) / cameras), 16)
    assert all(kept[c] >= least for c in range(cameras) if c != missing)


def test_a_camera_that_drops_out_returns_with_its_decayed_attention() -> None:
    grid = PatchGrid(2, 4, 4)
    method, memory = VLAPruner(half_life_s=0.1), episode()
    looked = torch.arange(32.0) + 1
    remember(memory, looked, torch.arange(32), grid, time_s=0.0, epoch=0)
    remember(memory, looked[:16], torch.arange(16), grid, time_s=0.1, epoch=0)
    guide = guide_of(method, memory.state[STATE], 0.1, grid)
    ratio = guide / looked
    weights, values = (1.0, 0.5), (0.5, 1.0)
    expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert torch.allclose(ratio[16:] / ratio[:16], torch.tensor(expected))


# --- episodes never mix


@given(SEED, st.sampled_from(MODES))
def test_nothing_crosses_from_one_episode_to_the_next(seed: int, mode: Any) -> None:
    """Neither kept values nor a vector whose inference began before the reset."""
    method = VLAPruner(mode=mode, semantic="last", refresh_every=2)
    fresh, used = episode(1), episode(0)
    for tick in range(4):
        step(method, used, seed - tick, 9)
    used.reset()
    begin_episode(used, 1)
    for tick in range(5):
        late = torch.full((64,), 1e6)
        remember(used, late, torch.arange(64), GRID, time_s=99.0, epoch=0)
        assert torch.equal(*(step(method, m, seed + tick, 9) for m in (fresh, used)))


@settings(max_examples=60)
@given(SEED, st.sampled_from(MODES), st.integers(1, 3), st.sampled_from([1, 2, 4]), st.data())
def test_a_batch_decides_as_each_alone(
    seed: int, mode: Any, cameras: int, reach: int, data: st.DataObject
) -> None:
    """Streams differ in history, in refresh ticks, in stale steps and in places without a token."""
    grid, draw = PatchGrid(cameras, 4, 5), torch.Generator().manual_seed(seed)
    method = VLAPruner(mode=mode, semantic="last", refresh_every=2, reach=reach)
    n = data.draw(st.integers(2, grid.size))
    streams = []
    for pushed in data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4)):
        memory, now_s = episode(), data.draw(st.sampled_from([0.6, 2.2, 9.0]))
        for t in range(pushed):
            seen_at = torch.randperm(grid.size, generator=draw)[:n]
            looked = torch.randint(0, 3, (n,), generator=draw).float()
            remember(memory, looked, seen_at, grid, time_s=t * 0.1, epoch=0)
        present = torch.randperm(grid.size, generator=draw)[:n].sort().values
        streams.append((*scene(seed + pushed, grid, present, now_s), memory))
    budgets = [Budget(data.draw(st.integers(1, n)))] * len(streams)
    tokens, signals, memories = map(list, zip(*streams, strict=True))
    together = reduce_batch(method, tokens, signals, budgets, memories)
    for plan, (video, known, memory) in zip(together, streams, strict=True):
        alone = reduce_stage(method, video, known, budgets[0], memory)
        assert torch.equal(plan.anchor, alone.anchor)


def test_a_batch_of_several_grids_decides_as_each_alone() -> None:
    method = VLAPruner(semantic="last")
    streams = [
        (*scene(i, grid, torch.arange(grid.size), 0.0), episode())
        for i, grid in enumerate((PatchGrid(2, 4, 6), PatchGrid(4, 4, 3), PatchGrid(1, 6, 8)))
    ]
    tokens, signals, memories = map(list, zip(*streams, strict=True))
    together = reduce_batch(method, tokens, signals, [Budget(9)] * 3, memories)
    for plan, (video, known, memory) in zip(together, streams, strict=True):
        assert torch.equal(
            plan.anchor, reduce_stage(method, video, known, Budget(9), memory).anchor
        )


def test_a_newer_epoch_forgets_values_and_ages() -> None:
    memory = episode(0)
    remember(memory, torch.ones(64), torch.arange(64), GRID, time_s=50.0, epoch=0)
    remember(memory, torch.ones(3), torch.arange(3), GRID, time_s=0.0, epoch=1)
    history = memory.state[STATE]
    assert (history.epoch, history.pushed, len(history.glances)) == (1, 1, 1)
    assert imputed(history.glances, 0.5)[0, 3:].sum() == 0


@given(SEED, st.sampled_from(MODES))
def test_two_interleaved_episodes_do_not_affect_each_other(seed: int, mode: Any) -> None:
    method = VLAPruner(mode=mode, semantic="prefill")
    alone = [
        [step(method, m, seed + s + t, 9) for t in range(5)]
        for s, m in enumerate((episode(), episode()))
    ]
    memories = episode(), episode()
    for t in range(5):
        for s, memory in enumerate(memories):
            assert torch.equal(step(method, memory, seed + s + t, 9), alone[s][t])


def test_a_history_of_other_cameras_is_refused() -> None:
    memory = episode()
    remember(memory, torch.ones(4), torch.arange(4), PatchGrid(1, 2, 2), time_s=0.0, epoch=0)
    with pytest.raises(ValueShapeError, match="begin a new episode"):
        step(VLAPruner(), memory, 0, 9)


def test_nan_in_the_embeddings_is_named() -> None:
    tokens, signals = scene(0)
    x = torch.full((64, 6), torch.nan)
    signals = signals.extended({Signal.INPUT_EMBEDDINGS: x})
    with pytest.raises(SignalError, match="input_embeddings"):
        reduce_stage(VLAPruner(), tokens, signals, Budget(9), episode())


# --- devices


def loop_on(device: str, mode: Any, steps: int = 6) -> list[Tensor]:
    """The anchors of a few steps of two cameras in a closed loop."""
    grid, anchors = PatchGrid(2, 8, 8), []
    method, memory = VLAPruner(mode=mode, semantic="last", refresh_every=2), episode()
    for t in range(steps):
        tokens, signals = scene(t, grid)
        x, index = tokens.x.to(device), tokens.index.to(device)
        needs = {s: signals[s].to(device) for s in method.needs}
        looked = signals[Signal.PREFILL_ROWS].to(device)
        moved = VisualTokens(x, index, grid, (t * 0.1,) * 2)
        anchors.append(reduce_stage(method, moved, Signals(needs), Budget(20), memory).anchor)
        kept = anchors[-1]
        remember(memory, looked[kept], kept, grid, time_s=t * 0.1, epoch=0)
    return anchors


@pytest.mark.parametrize("mode", MODES)
def test_no_decision_waits_for_the_device(mode: Any) -> None:
    """On the meta device, which has shapes but no values, asking for a value raises."""
    counts = [anchor.numel() for anchor in loop_on("meta", mode)]
    assert counts == ([20] * 6 if mode == "default" else [128] * 3 + [20] * 3)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_a_gpu_decides_like_a_cpu(mode: Any) -> None:
    expected = loop_on("cpu", mode)
    for ours, anchor in zip(loop_on("cuda", mode), expected, strict=True):
        assert torch.equal(ours.cpu(), anchor)
