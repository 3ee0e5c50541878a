"""Every registered reducer keeps the contract, and each does what its name says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stream.check import check_reducer
from stream.data import Budget, PatchGrid, Segment, VisualTokens
from stream.errors import BudgetError, ConfigError
from stream.golden.holitom import temporal_mean
from stream.memory import Memory
from stream.ops import similarity
from stream.plan import Plan
from stream.reducers.base import Reducer, reduce_stage
from stream.reducers.holitom import HoliTom
from stream.reducers.inner_merge import InnerMerge, fold
from stream.registry import build_reducer, reducer_class, reducer_names
from stream.segmenters import static_windows
from stream.segmenters.static_layout import Windows, corrected_ratio, published_counts
from stream.signals import Signal, Signals

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("holitom", {"counts": "published", "order": "published"}),
    ("holitom", {"contextual": 0.4}),
    ("holitom", {"contextual": 1.0, "merge": "mean"}),
    ("holitom", {"tau_quantile": 0.5, "neighbours": 1}),
    ("holitom", {"static_saliency": 1.0, "inner": None}),
    ("holitom", {"max_segment_frames": 2, "beta": 0.0}),
    ("inner_merge", {"drop": 0.9}),
    ("fastv", {"layer": 1}),
]


def video(frames: int, patches: int, still: float, seed: int = 0) -> tuple[VisualTokens, Tensor]:
    """(tokens, saliency): a share `still` of the patches differs little from the frame before."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(frames, patches, 12, generator=draw)
    for t in range(1, frames):
        holds = torch.rand(patches, 1, generator=draw) < still
        x[t] = torch.where(holds, x[t - 1] + 0.05 * x[t], x[t])
    grid = PatchGrid(frames, 1, patches)
    times = tuple(float(t) for t in range(frames))
    saliency = torch.rand(frames * patches, generator=draw)
    return VisualTokens.full(x.view(-1, 12), grid, times), saliency


def planned(
    reducer: Reducer, tokens: VisualTokens, score: Tensor, k: int, memory: Memory | None = None
) -> Plan:
    signals = Signals(dict.fromkeys(Signal, score))
    return reduce_stage(reducer, tokens, signals, Budget(k), memory or Memory())


# ---------------------------------------------------------------- the contract


@pytest.mark.parametrize("name", reducer_names())
def test_contract(name: str) -> None:
    assert check_reducer(name) == []


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_contract_with_settings(name: str, settings: dict[str, Any]) -> None:
    assert check_reducer(name, **settings) == []


@pytest.mark.parametrize("name", reducer_names())
def test_keeping_all_is_the_identity(name: str) -> None:
    tokens, score = video(3, 5, 0.5)
    for stage in build_reducer(name).stages:
        if stage.keeps(tokens.n, Budget(tokens.n)) == tokens.n:
            plan = planned(stage, tokens, score, tokens.n)
            assert plan.same_as(Plan.identity(tokens.n))
        else:
            assert isinstance(stage, InnerMerge)  # keeps a share of its own


def test_the_registry_finds_classes_by_file_and_helps_with_names() -> None:
    assert set(reducer_names()) >= {
        "fastv",
        "holitom",
        "identity",
        "inner_merge",
        "random_keep",
        "saliency",
        "uniform",
        "uniform_frames",
    }
    assert "base" not in reducer_names()
    assert reducer_class("inner-merge") is InnerMerge
    with pytest.raises(ConfigError, match=r"Unknown reducer 'holitomm'\. Did you mean 'holitom'"):
        reducer_class("holitomm")
    with pytest.raises(ConfigError, match=r"HoliTom cannot be built: tua: .*Settings: tau, "):
        build_reducer("holitom", tua=0.5)


def test_nothing_before_the_model_is_an_error_and_inside_it_is_not() -> None:
    tokens, score = video(2, 3, 0.0)
    with pytest.raises(BudgetError, match="at least 1 must reach it"):
        planned(build_reducer("saliency"), tokens, score, 0)
    assert planned(build_reducer("fastv"), tokens, score, 0).k == 0


# ---------------------------------------------------------------- simple reducers


@pytest.mark.parametrize("name", ["saliency", "fastv"])
def test_top_k_of_the_score(name: str) -> None:
    tokens, score = video(3, 7, 0.0)
    best = sorted(range(21), key=lambda i: (-float(score[i]), i))[:6]
    assert planned(build_reducer(name), tokens, score, 6).anchor.tolist() == sorted(best)


def test_identity_keeps_all_whatever_the_budget() -> None:
    tokens, score = video(2, 3, 0.0)
    assert planned(build_reducer("identity"), tokens, score, 1).same_as(Plan.identity(6))


def test_random_depends_on_seed_and_tick_alone() -> None:
    tokens, score = video(4, 16, 0.0)
    reducer = build_reducer("random_keep")

    def anchors(seed: int, tick: int) -> list[int]:
        return planned(reducer, tokens, score, 16, Memory(seed, tick)).anchor.tolist()

    assert anchors(0, 0) == anchors(0, 0)
    assert len({tuple(anchors(s, t)) for s in range(4) for t in range(4)}) == 16


def test_random_is_uniform_over_tokens() -> None:
    tokens, score = video(1, 10, 0.0)
    hits = torch.zeros(10)
    for seed in range(400):
        plan = planned(build_reducer("random_keep"), tokens, score, 3, Memory(seed))
        hits[plan.anchor] += 1
    assert bool(((hits - 120).abs() < 45).all())  # 120 +- 9 expected; 5 sigma


@pytest.mark.parametrize("k", [1, 5, 10, 11, 29, 30, 59])
def test_uniform_frames_takes_whole_frames_and_samples_only_the_last(k: int) -> None:
    tokens, score = video(6, 10, 0.0)
    plan = planned(build_reducer("uniform_frames"), tokens, score, k)
    held = torch.bincount(plan.anchor // 10, minlength=6)
    whole, rest = divmod(k, 10)
    assert sorted(held.tolist(), reverse=True)[: whole + 1] == [*[10] * whole, rest]
    assert int(held.sum()) == k
    used = held.nonzero().view(-1)
    gaps = used.diff()
    assert len(used) < 3 or int(gaps.max()) - int(gaps.min()) <= 1


def test_uniform_frames_fills_up_where_frames_hold_less() -> None:
    """After an earlier stage frames differ in size; the budget is met all the same."""
    tokens, score = video(3, 10, 0.0)
    index = torch.tensor([0, 10, 11, 12, 13, 14, 15, 16, 17, 29])
    part = VisualTokens(tokens.x[index], index, tokens.grid, tokens.pts_s)
    for k in range(1, 10):
        plan = planned(build_reducer("uniform_frames"), part, score[index], k)
        assert plan.anchor.unique().numel() == k


@pytest.mark.parametrize("k", [1, 4, 12, 33, 47])
def test_uniform_covers_all_frames_evenly(k: int) -> None:
    tokens, score = video(4, 12, 0.0)
    plan = planned(build_reducer("uniform"), tokens, score, k)
    held = torch.bincount(plan.anchor // 12, minlength=4)
    assert int(held.max()) - int(held.min()) <= 1
    part = VisualTokens(tokens.x[::2], tokens.index[::2], tokens.grid, tokens.pts_s)
    assert planned(build_reducer("uniform"), part, score[::2], min(k, 23)).k == min(k, 23)


# ---------------------------------------------------------------- HoliTom, by hand


@dataclass
class Row:
    """One output token of the slow reference."""

    anchor: int
    weight: dict[int, float]


class TooClose(Exception):
    """The reference's choice hangs on rounding."""


def slow_peaks(points: list[Tensor], count: int, near: int) -> tuple[list[int], list[int]]:
    """(centres ascending, owner of each point) by density peaks, one distance at a time."""
    n, width = len(points), points[0].numel()
    far = [[float((a - b).norm()) / math.sqrt(width) for b in points] for a in points]
    rho = [math.exp(-sum(d * d for d in sorted(row)[:near]) / near) for row in far]
    largest = max(map(max, far))
    score = []
    for i in range(n):
        if near > 1 and any(j != i and abs(rho[j] - rho[i]) < 1e-6 for j in range(n)):
            raise TooClose
        denser = [far[i][j] for j in range(n) if rho[j] > rho[i]]
        score.append(rho[i] * min(denser, default=largest))
    ranked = sorted(range(n), key=lambda i: (-score[i], i))
    if near > 1 and count < n and abs(score[ranked[count - 1]] - score[ranked[count]]) < 1e-6:
        raise TooClose
    centres = sorted(ranked[:count])
    owner = [i if i in centres else min(centres, key=lambda c: far[i][c]) for i in range(n)]
    return centres, owner


def slow_merge(units: list[Row], x: Tensor, count: int, near: int, how: HoliTom) -> list[Row]:
    """`count` clusters of units, averaged as `how` says."""
    if count == 0 or not units:
        return []
    points = [sum((w * x[i] for i, w in u.weight.items()), torch.zeros(())) for u in units]
    centres, owner = slow_peaks([torch.as_tensor(p) for p in points], count, near)
    rows = []
    for centre in centres:
        members = [i for i in range(len(units)) if owner[i] == centre]
        row = Row(units[centre].anchor, {})
        for i in members:
            if how.merge == "mean" or len(members) == 1:
                share = 1 / len(members)
            else:
                share = how.beta if i == centre else (1 - how.beta) / (len(members) - 1)
            for token, weight in units[i].weight.items():
                row.weight[token] = row.weight.get(token, 0.0) + share * weight
        rows.append(row)
    return rows


def slow_holitom(tokens: VisualTokens, saliency: Tensor, k: int, how: HoliTom) -> list[Row]:
    """HoliTom in the published counts and order, with loops only."""
    frames, size = tokens.grid.frames, tokens.grid.per_frame
    x = tokens.x.double()
    cos = torch.cosine_similarity
    holds = [
        [float(cos(x[t * size + p], x[(t + 1) * size + p], 0)) > how.tau for p in range(size)]
        for t in range(frames - 1)
    ]
    best: list[tuple[int, list[Segment]]] = [(0, [])]
    for stop in range(1, frames + 1):
        options = []
        for start in range(stop - 1, -1, -1):
            inside = range(start, stop - 1)
            still = sum(all(holds[t][p] for t in inside) for p in range(size))
            gain = best[start][0] + still * (stop - 1 - start)
            options.append((gain, [*best[start][1], Segment(start, stop)]))
        best.append(max(options, key=lambda option: option[0]))
    saved, segments = best[-1]
    ratio = min(k / tokens.n / ((tokens.n - saved) / tokens.n), 1.0)

    rows = []
    for segment in segments:
        inside = range(segment.start, segment.stop - 1)
        held_still = [p for p in range(size) if len(inside) and all(holds[t][p] for t in inside)]
        share = 1 / len(segment)
        units = [
            Row(
                segment.start * size + p,
                {t * size + p: share for t in range(segment.start, segment.stop)},
            )
            for p in held_still
        ]
        count = round(len(held_still) * ratio)
        rows += slow_merge(units, x, count, min(how.neighbours, count), how)
        for t in range(segment.start, segment.stop):
            moving = [t * size + p for p in range(size) if p not in held_still]
            total = math.ceil(len(moving) * ratio)
            direct = round(total * (1 - how.contextual))
            ranked = sorted(moving, key=lambda i: (-float(saliency[i]), i))
            rows += [Row(i, {i: 1.0}) for i in sorted(ranked[:direct])]
            others = [Row(i, {i: 1.0}) for i in sorted(ranked[direct:])]
            near = min(how.neighbours, total - direct)
            rows += slow_merge(others, x, total - direct, near, how)
    return rows


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"merge": "mean"},
        {"contextual": 0.5},
        {"contextual": 1.0, "beta": 0.3, "neighbours": 3},
        {"tau": 0.95},
    ],
)
def test_holitom_equals_a_slow_reference(settings: dict[str, Any]) -> None:
    plain = {"static_saliency": 0.0, "max_segment_frames": 1024}
    how = HoliTom(counts="published", order="published", **plain | settings)
    compared, merged = 0, 0
    for seed in range(24):
        frames, size = 1 + seed % 5, 6 + seed % 4
        tokens, saliency = video(frames, size, (0.0, 0.5, 0.9)[seed % 3], seed)
        k = max(1, tokens.n * (2 + seed % 5) // 10)
        try:
            rows = slow_holitom(tokens, saliency, k, how)
        except TooClose:
            continue
        plan = planned(how, tokens, saliency, k)
        dense = torch.zeros(len(rows), tokens.n)
        for r, row in enumerate(rows):
            for token, weight in row.weight.items():
                dense[r, token] = weight
        assert plan.anchor.tolist() == [row.anchor for row in rows]
        assert torch.allclose(plan.dense(), dense, atol=1e-6)
        compared += 1
        merged += not plan.is_gather and len(plan.entries()[0]) > plan.k
    assert compared >= 8
    assert merged >= 5


def test_holitom_is_density_after_temporal() -> None:
    """The whole plan takes equal parts of every frame of a window for each static patch."""
    tokens, saliency = video(5, 8, 0.9, seed=4)
    how = HoliTom()
    links, segments = how.segments(tokens)
    windows = Windows.of(links, segments)
    temporal, still = temporal_mean(windows, tokens.grid)
    assert bool(still.any())
    assert not bool(still.all())
    dense = temporal.dense()
    for row, is_still in zip(range(temporal.k), still.tolist(), strict=True):
        frame, patch = divmod(int(temporal.anchor[row]), 8)
        s = int(windows.segment[frame])
        window = segments[s] if is_still else Segment(frame, frame + 1)
        assert bool(windows.static[s, patch]) == is_still
        expected = torch.zeros(5, 8)
        expected[window.start : window.stop, patch] = 1 / len(window)
        assert torch.allclose(dense[row], expected.view(-1))
    whole = planned(how, tokens, saliency, 12)
    assert torch.allclose(whole.dense().sum(1), torch.ones(12), atol=1e-6)
    groups = whole.dense().view(12, 5, 8)
    for s, segment in enumerate(segments):  # static columns of one window are all alike
        part = groups[:, segment.start : segment.stop][:, :, windows.static[s]]
        assert torch.allclose(part, part[:, :1].expand_as(part), atol=1e-7)


# ---------------------------------------------------------------- HoliTom's laws


@given(
    frames=st.integers(1, 6),
    patches=st.integers(1, 20),
    still=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    part=st.floats(0, 1),
    seed=st.integers(0, 99),
    settings=st.sampled_from(
        [{}, {"contextual": 0.5}, {"tau_quantile": 0.5}, {"max_segment_frames": 2}]
    ),
)
def test_holitom_meets_every_budget_exactly(
    frames: int, patches: int, still: float, part: float, seed: int, settings: dict[str, Any]
) -> None:
    tokens, saliency = video(frames, patches, still, seed)
    k = max(1, round(part * tokens.n))
    plan = planned(HoliTom(**settings), tokens, saliency, k)
    assert plan.k == k
    assert bool((plan.anchor.diff() > 0).all())
    if k < tokens.n:
        assert torch.allclose(plan.dense().sum(1), torch.ones(k), atol=1e-5)


@pytest.mark.parametrize("k", [1, 5, 10, 11, 14, 20, 41, 79])
def test_identical_frames_spend_spare_budget_on_time(k: int) -> None:
    """8 equal frames of 10 patches collapse to 10 tokens; a larger budget splits the window."""
    tokens, saliency = video(1, 10, 0.0)
    grid = PatchGrid(8, 1, 10)
    same = VisualTokens.full(tokens.x.repeat(8, 1), grid, tuple(map(float, range(8))))
    plan = planned(HoliTom(), same, saliency.repeat(8), k)
    assert plan.k == k
    assert torch.allclose(plan.dense().sum(1), torch.ones(k), atol=1e-6)
    if k == 10:
        assert plan.anchor.tolist() == list(range(10))
        assert torch.allclose(plan.dense(), torch.eye(10).repeat(1, 8) / 8)
    if k > 10:
        assert torch.unique(plan.anchor // 10).numel() > 1


def test_one_frame_is_saliency_top_k() -> None:
    tokens, saliency = video(1, 30, 0.0)
    plan = planned(HoliTom(), tokens, saliency, 9)
    assert plan.same_as(planned(build_reducer("saliency"), tokens, saliency, 9))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("retain", [0.05, 0.15, 0.25, 0.5])
def test_published_counts_are_the_published_formulas(seed: int, retain: float) -> None:
    tokens, saliency = video(6, 14, 0.85, seed)
    how = HoliTom(counts="published", order="published")
    k = Budget.ratio(retain, tokens.n).tokens
    links, segments = how.segments(tokens)
    n_static = [int(links[s.start : s.stop - 1].all(0).sum()) * (len(s) > 1) for s in segments]
    saved = sum(n * (len(s) - 1) for n, s in zip(n_static, segments, strict=True))
    ratio = min((k / 84) / ((84 - saved) / 84), 1.0)
    windows = Windows.of(links, segments)
    static, dynamic = published_counts(ratio, windows)
    assert windows.saved == saved
    assert corrected_ratio(k / 84, 84, saved) == pytest.approx(ratio, abs=1e-12)
    assert static.tolist() == [round(n * ratio) for n in n_static]
    each = [math.ceil((14 - n) * ratio) for n in n_static]
    assert dynamic.tolist() == [each[s] for s in windows.segment.tolist()]
    plan = planned(how, tokens, saliency, k)
    assert plan.k == int(static.sum() + dynamic.sum())


def test_tau_by_quantile_is_the_quantile_of_the_videos_own_similarities() -> None:
    tokens, _ = video(5, 9, 0.5, seed=2)
    alike = similarity.adjacent_cosine(tokens.x.view(5, 9, -1)).numpy()
    for q in (0.1, 0.5, 0.9):
        links, segments = HoliTom(tau_quantile=q).segments(tokens)
        assert abs(links.mean() - (1 - q)) <= 1 / links.size + 1e-9
        fixed = HoliTom(tau=float(np.quantile(alike, q)))
        assert (fixed.segments(tokens)[0] == links).all()
        assert fixed.segments(tokens)[1] == segments
    one, _ = video(1, 9, 0.5)
    assert HoliTom(tau_quantile=0.5).segments(one)[1] == [Segment(0, 1)]


def test_the_longest_window_is_held() -> None:
    tokens, saliency = video(9, 4, 1.0)
    memory = Memory()
    assert HoliTom(max_segment_frames=9).segments(tokens)[1] == [Segment(0, 9)]
    assert max(map(len, HoliTom(max_segment_frames=4).segments(tokens)[1])) == 4
    planned(HoliTom(max_segment_frames=4), tokens, saliency, 6, memory)
    links, _ = HoliTom().segments(tokens)
    segments, _ = static_windows.segment(links, 4)
    assert memory.state["segments"] == [s.start for s in segments]


@pytest.mark.parametrize(("contextual", "alone"), [(0.0, 8), (0.25, 6), (0.5, 4), (1.0, 0)])
def test_the_contextual_share_is_clustered_not_dropped(contextual: float, alone: int) -> None:
    tokens, saliency = video(1, 20, 0.0, seed=1)
    plan = planned(HoliTom(contextual=contextual), tokens, saliency, 8)
    salient = set(saliency.topk(alone).indices.tolist())
    single = set(plan.anchor[plan.dense().count_nonzero(1) == 1].tolist())
    assert salient <= single
    reached = int((plan.dense().sum(0) > 0).sum())
    assert reached == (20 if contextual else 8)


def test_orders_hold_the_same_rows() -> None:
    tokens, saliency = video(6, 9, 0.7, seed=5)
    time = planned(HoliTom(order="time"), tokens, saliency, 25)
    published = planned(HoliTom(order="published"), tokens, saliency, 25)
    assert bool((time.anchor.diff() > 0).all())
    assert not torch.equal(time.anchor, published.anchor)
    assert published.ascending().same_as(time)


def test_published_order_puts_static_tokens_first_in_each_segment() -> None:
    tokens, saliency = video(6, 9, 0.8, seed=5)
    how = HoliTom(order="published", contextual=0.5)
    plan = planned(how, tokens, saliency, 25)
    links, segments = how.segments(tokens)
    windows = Windows.of(links, segments)
    frame, patch = (plan.anchor // 9).numpy(), (plan.anchor % 9).numpy()
    segment = windows.segment[frame]
    still = windows.static[segment, patch]
    keys = list(zip(segment.tolist(), (~still).tolist(), (frame * ~still).tolist(), strict=True))
    assert keys == sorted(keys)


def test_static_saliency_draws_cluster_centres_to_salient_patches() -> None:
    tokens, _ = video(4, 24, 1.0, seed=3)
    saliency = torch.full((96,), 0.01)
    saliency.view(4, 24)[:, [5, 17]] = 1.0
    plain = set(planned(HoliTom(static_saliency=0.0), tokens, saliency, 2).anchor.tolist())
    drawn = set(planned(HoliTom(static_saliency=4.0), tokens, saliency, 2).anchor.tolist())
    assert plain != {5, 17}
    assert drawn == {5, 17}


def test_partial_grids_are_refused_with_advice() -> None:
    tokens, saliency = video(2, 6, 0.0)
    part = VisualTokens(tokens.x[:8], tokens.index[:8], tokens.grid, tokens.pts_s)
    with pytest.raises(ConfigError, match="got 8 of 12 patches; let it be the first reducer"):
        planned(HoliTom(), part, saliency[:8], 4)


# ---------------------------------------------------------------- inner merge


@pytest.mark.parametrize("seed", range(5))
def test_fold_equals_folding_one_by_one(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(20, 6, generator=draw).double()
    kept = torch.randperm(20, generator=draw)[:7].sort().values
    target = {int(i): x[i].clone() for i in kept}
    nearest = {
        i: max(target, key=lambda j: float(torch.cosine_similarity(x[i], x[j], 0)))
        for i in range(20)
        if i not in target
    }
    for i, j in nearest.items():  # ascending
        target[j] = (target[j] + x[i]) / 2
    plan = fold(x.float(), kept)
    expected = torch.stack(list(target.values()))
    assert torch.equal(plan.anchor, kept)
    assert torch.allclose(plan.dense().double() @ x, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("n", "drop", "budget", "kept"),
    [(40, 0.5, 40, 20), (5, 0.5, 5, 2), (7, 0.5, 7, 4), (40, 0.5, 8, 8), (40, 0.0, 40, 40)],
)
def test_inner_merge_keeps_its_share_and_never_more_than_the_budget(
    n: int, drop: float, budget: int, kept: int
) -> None:
    assert InnerMerge(drop=drop).keeps(n, Budget(budget)) == kept


def test_inner_merge_site_is_a_share_of_the_depth() -> None:
    assert InnerMerge().site.layer_index(28) == 18
    assert InnerMerge(layer=3).site.layer_index(6) == 3
    with pytest.raises(ConfigError, match=r"acts at layer 6, the model has layers 0\.\.5"):
        InnerMerge(layer=6).site.layer_index(6)
