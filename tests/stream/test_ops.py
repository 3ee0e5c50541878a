"""The tensor functions against loops that are too plain to be wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stream.data import PatchGrid
from stream.errors import BudgetError
from stream.ops import clusters, counts, grids, merges, picks, similarity

scores = st.lists(st.integers(-3, 3), min_size=1, max_size=12)  # few values: many ties


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- counts

groups = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 7)), min_size=1, max_size=8)


def allocated(weight: list[float], cap: list[int], total: int) -> list[int]:
    return counts.allocate(np.array(weight), np.array(cap), total).tolist()


@given(groups, st.floats(0, 1))
def test_allocate_shares_exactly_within_caps(pairs: list[tuple[int, int]], part: float) -> None:
    weight, cap = [float(w) for w, _ in pairs], [c for _, c in pairs]
    total = round(part * sum(cap))
    given_out = allocated(weight, cap, total)
    assert sum(given_out) == total
    assert all(0 <= g <= c for g, c in zip(given_out, cap, strict=True))


@given(groups, st.floats(0, 1))
def test_allocate_gives_more_to_the_heavier_of_two_open_groups(
    pairs: list[tuple[int, int]], part: float
) -> None:
    weight, cap = [float(w) for w, _ in pairs], [c for _, c in pairs]
    got = allocated(weight, cap, round(part * sum(cap)))
    for i in range(len(cap)):
        for j in range(len(cap)):
            if weight[i] > weight[j] and got[i] < cap[i]:
                assert got[i] >= got[j]
            if weight[i] == weight[j] and i < j and got[i] < cap[i]:
                assert got[i] >= got[j]


@given(groups)
def test_allocate_by_size_stays_within_one_of_the_exact_part(
    pairs: list[tuple[int, int]],
) -> None:
    """Caps equal to weights, as HoliTom shares a budget over segments and frames."""
    cap = [w for w, _ in pairs]
    for total in range(sum(cap) + 1):
        for got, size in zip(allocated([float(c) for c in cap], cap, total), cap, strict=True):
            exact = size * total / sum(cap) if sum(cap) else 0.0
            assert math.floor(exact - 1e-9) <= got <= math.ceil(exact + 1e-9)


@pytest.mark.parametrize(
    ("weight", "cap", "total", "expected"),
    [
        ([10, 1, 1, 1], [16, 16, 16, 16], 40, [16, 8, 8, 8]),  # a cap's surplus is shared again
        ([1, 1, 1], [9, 9, 9], 4, [2, 1, 1]),  # the odd unit goes to the lower index
        ([1, 1, 1], [9, 9, 9], 5, [2, 2, 1]),
        ([0, 0], [3, 3], 3, [2, 1]),  # no weight at all: equal shares
        ([5, 0], [2, 3], 4, [2, 2]),  # weightless groups take what no other can
        ([1, 2], [4, 4], 0, [0, 0]),
        ([1, 2], [4, 4], 8, [4, 4]),
    ],
)
def test_allocate_by_hand(
    weight: list[float], cap: list[int], total: int, expected: list[int]
) -> None:
    assert allocated(weight, cap, total) == expected


def test_allocate_says_what_does_not_fit() -> None:
    with pytest.raises(BudgetError, match="9 tokens cannot be shared over groups that hold 8"):
        allocated([1.0, 1.0], [4, 4], 9)


# ---------------------------------------------------------------- picks


@given(scores, st.integers(0, 14))
def test_top_takes_the_largest_and_of_equals_the_first(values: list[int], k: int) -> None:
    best = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert picks.top(torch.tensor(values, dtype=torch.float32), k).tolist() == sorted(best)


def test_top_works_row_by_row() -> None:
    score = drawn(3, 4, 9)
    rows = [picks.top(row, 5) for row in score.view(12, 9)]
    assert torch.equal(picks.top(score, 5), torch.stack(rows).view(3, 4, 5))


@given(st.lists(st.tuples(st.lists(st.integers(-2, 2), min_size=6, max_size=6), st.integers(0, 7))))
def test_top_mask_is_top_with_a_count_of_its_own(rows: list[tuple[list[int], int]]) -> None:
    score = torch.tensor([v for v, _ in rows], dtype=torch.float32).view(-1, 6)
    mask = picks.top_mask(score, torch.tensor([k for _, k in rows], dtype=torch.long))
    for got, (values, k) in zip(mask, rows, strict=True):
        assert got.nonzero().view(-1).tolist() == picks.top(torch.tensor(values), k).tolist()


@given(st.lists(st.lists(st.integers(-2, 2), min_size=6, max_size=6), min_size=1), st.data())
def test_top_places_are_the_places_of_top_mask(rows: list[list[int]], data: st.DataObject) -> None:
    score = torch.tensor(rows, dtype=torch.float32)
    k = [data.draw(st.integers(0, 6)) for _ in rows]
    base = torch.repeat_interleave(torch.arange(len(rows)) * 6, torch.tensor(k))
    pick = base + torch.tensor([rank for count in k for rank in range(count)], dtype=torch.long)
    mask = picks.top_mask(score, torch.tensor(k))
    places = picks.top_places(score, pick, base)
    assert torch.equal(places.sort().values, mask.view(-1).nonzero().view(-1))


@given(st.integers(1, 400), st.floats(0, 1))
def test_spaced_is_distinct_and_even(n: int, part: float) -> None:
    k = round(part * n)
    index = picks.spaced(n, k)
    assert index.tolist() == sorted(set(index.tolist()))
    assert len(index) == k
    if k:
        assert int(index[0]) >= 0
        assert int(index[-1]) < n
        gaps = index.diff()
        assert k < 2 or int(gaps.max()) - int(gaps.min()) <= 1


@given(st.integers(1, 12), st.integers(1, 60), st.floats(0, 1))
def test_staggered_is_distinct_exact_and_in_every_frame(
    frames: int, size: int, part: float
) -> None:
    k = round(part * frames * size)
    index = picks.staggered(frames, size, k)
    assert index.tolist() == sorted(set(index.tolist()))
    assert len(index) == k
    held = torch.bincount(index // size, minlength=frames)
    assert held.numel() == frames
    assert int(held.max()) - int(held.min()) <= 1


@pytest.mark.parametrize("each", [7, 14, 28, 49])
def test_staggered_does_not_sample_the_same_patches_in_every_frame(each: int) -> None:
    """196 / 49 = 4 and so on: a plain stride would."""
    frames, size = 16, 196
    index = picks.staggered(frames, size, each * frames)
    within = (index % size).view(frames, each)
    assert torch.unique(within, dim=0).shape[0] >= min(size // each, frames) // 2
    assert torch.unique(within).numel() >= min(2 * each, size // 2)


# ---------------------------------------------------------------- similarity


def test_adjacent_cosine_is_torchs() -> None:
    x = drawn(5, 7, 16)
    x[2, 3] = 0
    expected = F.cosine_similarity(x[:-1], x[1:], dim=-1)
    assert torch.allclose(similarity.adjacent_cosine(x), expected, atol=1e-6)
    assert similarity.adjacent_cosine(x)[1:3, 3].tolist() == [0.0, 0.0]
    assert similarity.adjacent_cosine(x[:1]).shape == (0, 7)
    assert similarity.adjacent_cosine(x.bfloat16()).dtype == torch.float32


def test_cosine_is_torchs_for_all_pairs() -> None:
    a, b = drawn(2, 4, 6), drawn(2, 5, 6, seed=1)
    a[0, 0] = 0
    expected = F.cosine_similarity(a[:, :, None], b[:, None], dim=-1)
    assert torch.allclose(similarity.cosine(a, b), expected, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 24, 60])
def test_distances_are_euclidean_over_root_c(n: int) -> None:
    x = drawn(3, n, 8)
    expected = torch.cdist(x.double(), x.double()) / math.sqrt(8)
    got = similarity.distances(x)
    assert torch.allclose(got.double(), expected, atol=1e-5)
    assert torch.equal(got.diagonal(dim1=1, dim2=2), torch.zeros(3, n))


def test_distances_are_accurate_far_from_the_origin() -> None:
    """Without centring, float32 would lose differences of 1e-2 beside an offset of 100."""
    x = 100 + 0.01 * drawn(1, 40, 16)
    expected = torch.cdist(x.double(), x.double()) / 4
    got = similarity.distances(similarity.centred(x, torch.tensor([40])))
    assert torch.allclose(got.double(), expected, rtol=1e-3, atol=1e-5)


def test_distances_of_ragged_groups_are_those_of_each_group() -> None:
    x, sizes = drawn(3, 6, 5), torch.tensor([6, 2, 4])
    padded = x * (torch.arange(6) < sizes[:, None])[..., None]
    got = similarity.distances(similarity.centred(padded, sizes))
    for group, size, own in zip(x, sizes.tolist(), got, strict=True):
        alone = similarity.distances(group[None, :size])[0]
        assert torch.allclose(own[:size, :size], alone, atol=1e-6)


# ---------------------------------------------------------------- clusters


def density_peaks_by_loop(distance: list[list[float]], neighbours: int) -> list[float]:
    n = len(distance)
    rho = []
    for i in range(n):
        near = sorted(distance[i])[:neighbours]
        rho.append(math.exp(-sum(d * d for d in near) / neighbours))
    largest = max(max(row) for row in distance)
    result = []
    for i in range(n):
        denser = [distance[i][j] for j in range(n) if rho[j] > rho[i]]
        result.append(rho[i] * (min(denser) if denser else largest))
    return result


@pytest.mark.parametrize("neighbours", [1, 3, 7])
@pytest.mark.parametrize("n", [1, 2, 5, 19])
def test_density_peaks_equal_a_loop(n: int, neighbours: int) -> None:
    if neighbours > n:
        neighbours = n
    distance = similarity.distances(drawn(4, n, 3, seed=n))
    got = clusters.density_peak_score(distance, torch.full((4,), neighbours))
    for rows, scored in zip(distance.tolist(), got, strict=True):
        expected = torch.tensor(density_peaks_by_loop(rows, neighbours))
        assert torch.allclose(scored, expected, atol=1e-6)


def test_density_peaks_of_padded_groups_equal_each_group_alone() -> None:
    sizes, near = torch.tensor([9, 4, 1, 6]), torch.tensor([3, 2, 1, 6])
    valid = torch.arange(9) < sizes[:, None]
    x = drawn(4, 9, 3) * valid[..., None]
    distance = similarity.distances(similarity.centred(x, sizes))
    got = clusters.density_peak_score(distance, near, valid)
    assert bool((got[~valid] == -torch.inf).all())
    for i, (size, count) in enumerate(zip(sizes.tolist(), near.tolist(), strict=True)):
        alone = distance[i : i + 1, :size, :size]
        expected = clusters.density_peak_score(alone, torch.tensor([count]))[0]
        assert torch.allclose(got[i, :size], expected, atol=1e-6)


def test_density_noise_is_added_to_the_density() -> None:
    distance = similarity.distances(torch.zeros(1, 4, 2))
    noise = torch.tensor([[0.0, 0.3, 0.1, 0.2]])
    far = distance + 1 - torch.eye(4)
    got = clusters.density_peak_score(far, torch.tensor([1]), noise=noise)
    assert torch.allclose(got, 1 + noise, atol=1e-6)


@given(st.integers(1, 8), st.data())
def test_assign_takes_the_nearest_centre_and_of_equals_the_first(
    n: int, data: st.DataObject
) -> None:
    cells = data.draw(st.lists(st.integers(0, 3), min_size=n * n, max_size=n * n))
    distance = torch.tensor(cells, dtype=torch.float32).view(1, n, n)
    chosen = data.draw(st.sets(st.integers(0, n - 1), min_size=1))
    centre = torch.tensor([[i in chosen for i in range(n)]])
    for i, owner in enumerate(clusters.assign(distance, centre)[0].tolist()):
        best = min(sorted(chosen), key=lambda c, i=i: float(distance[0, i, c]))  # type: ignore[misc]
        assert owner == (i if i in chosen else best)


# ---------------------------------------------------------------- merges


@st.composite
def owners(draw: st.DrawFn) -> list[int]:
    """The centre of each token; a centre owns itself."""
    n = draw(st.integers(1, 10))
    centres = sorted(draw(st.sets(st.integers(0, n - 1), min_size=1)))
    return [i if i in centres else draw(st.sampled_from(centres)) for i in range(n)]


@pytest.mark.parametrize("beta", [0.0, 0.6, 1.0])
@given(owner=owners())
def test_cluster_weights_equal_a_loop(beta: float, owner: list[int]) -> None:
    by_beta = merges.cluster_weights(torch.tensor(owner), "beta", beta)
    by_mean = merges.cluster_weights(torch.tensor(owner), "mean", beta)
    for i, centre in enumerate(owner):
        size = owner.count(centre)
        expected = 1.0 if size == 1 else beta if centre == i else (1 - beta) / (size - 1)
        assert float(by_beta[i]) == pytest.approx(expected, abs=1e-6)
        assert float(by_mean[i]) == pytest.approx(1 / size, abs=1e-6)


def test_weights_of_padded_groups_are_those_of_each_group() -> None:
    distance = torch.tensor([[0.0, 1, 5], [1, 0, 5], [5, 5, 0]]).expand(2, 3, 3)
    owner = clusters.assign(distance, torch.tensor([[True, False, True], [True, False, False]]))
    assert owner.tolist() == [[0, 0, 2], [3, 3, 3]]
    weight = clusters.weights(owner, torch.tensor([[2, 2, 2], [1, 1, 0]]), "beta", 0.6)
    assert torch.allclose(weight[0], torch.tensor([0.3, 0.2, 0.5]))
    assert torch.allclose(weight[1, :2], torch.tensor([0.6, 0.4]))


@given(st.integers(1, 5), st.lists(st.integers(0, 4), max_size=20))
def test_halving_weights_equal_folding_one_by_one(k: int, raw: list[int]) -> None:
    slot = torch.tensor([s % k for s in raw], dtype=torch.long)
    source = drawn(slot.numel(), 6, seed=3).double()
    target = drawn(k, 6, seed=4).double()
    folded = target.clone()
    for s, x in zip(slot.tolist(), source, strict=True):
        folded[s] = (folded[s] + x) / 2
    given_weight, own = merges.halving_weights(slot, k)
    closed = target * own.double()[:, None]
    closed.index_add_(0, slot, source * given_weight.double()[:, None])
    assert torch.allclose(closed, folded, atol=1e-12)


# ---------------------------------------------------------------- grids


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.data())
def test_newlines_equal_a_walk_over_the_tokens(
    frames: int, rows: int, cols: int, data: st.DataObject
) -> None:
    grid = PatchGrid(frames, rows, cols)
    kept = sorted(data.draw(st.sets(st.integers(0, grid.size - 1))))
    anchor = torch.tensor(kept, dtype=torch.long)
    x = anchor[:, None].float()
    newline = torch.tensor([-1.0])

    walk: list[float] = []
    for i, place in enumerate(kept):
        walk.append(float(place))
        if i + 1 == len(kept) or kept[i + 1] // cols != place // cols:
            walk.append(-1.0)
    by_grid = grids.insert_rows(x, grids.newline_slots(anchor, grid, "grid"), newline)
    assert by_grid[:, 0].tolist() == walk
    by_one = grids.insert_rows(x, grids.newline_slots(anchor, grid, "one_token"), newline)
    assert by_one[:, 0].tolist() == [*map(float, kept), -1.0]


def test_pool_map_is_the_operator_that_pools_features() -> None:
    maps = drawn(3, 49)
    out = grids.pool_map(maps, 7, 7, 4, 4)
    expected = F.interpolate(maps.view(3, 1, 7, 7), size=(4, 4), mode="bilinear")
    assert torch.equal(out, expected.view(3, 16))
    flat = grids.pool_map(torch.full((1, 49), 0.3), 7, 7, 4, 4)
    assert torch.allclose(flat, torch.full((1, 16), 0.3))
