"""Golden files of HoliTom: single functions, the merge inside the model, whole pipelines."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data import PatchGrid, Segment
from ..ops import clusters, grids, merges, picks, similarity
from ..plan import Plan
from ..reducers import inner_merge
from ..reducers.holitom import HoliTom
from ..segmenters import static_windows
from ..segmenters.static_layout import Windows, corrected_ratio, published_counts
from .cases import Arrays, Case, differs, fitting, tensor

RATIO_ATOL = 1e-12
VALUE_TOL = {"rtol": 1e-5, "atol": 1e-5}
SKETCH_ATOL = 1e-3
NOISE_SCALE = 1e-6


def cases(arrays: Arrays) -> list[Case]:
    """All cases of a file; none if it holds no array of this method."""
    if any(name.startswith("combo_") for name in arrays):
        return fitting("file", lambda: list(_pipeline_cases(arrays)))
    found: list[Case] = []
    for kind, check in _CHECKS.items():
        pattern = re.compile(rf"({kind}\d+)_(.+)")
        matches = [m for m in map(pattern.fullmatch, arrays) if m]
        for name in sorted({m[1] for m in matches}):
            fields = {m[2]: arrays[m[0]] for m in matches if m[1] == name}
            found += fitting(name, partial(_judge, name, fields, check))
    return found


def _judge(name: str, fields: Arrays, check: Callable[[Arrays], str]) -> list[Case]:
    why = check(fields)
    if int(fields.get("stable", np.array(1))) == 0:
        return [Case(name, "failed", why) if why.startswith("count") else Case(name, "skipped")]
    return [Case(name, "failed" if why else "passed", why)]


def _check_dpc(case: Arrays) -> str:
    x, noise = tensor(case["x"]), tensor(case["noise"])
    count, near = (int(v) for v in case["params"])
    neighbours = torch.full((x.shape[0],), near)
    distance = similarity.distances(x)
    score = clusters.density_peak_score(distance, neighbours, noise=noise * NOISE_SCALE)
    centres = torch.sort(score, descending=True, stable=True).indices[:, :count]
    return differs("centres", centres, case["centers"])


def _check_windows(case: Arrays) -> str:
    _, tau, longest = case["params"]
    links = (tensor(case["sim"]) > float(tau)).numpy()
    segments, saved = static_windows.segment(links, int(longest))
    if saved != float(case["total_reduced"]):
        return f"saved {saved}, expected {float(case['total_reduced'])}"
    return differs("segments", _inclusive(segments), case["segments"])


def _inclusive(segments: list[Segment]) -> Tensor:
    return torch.tensor([[s.start, s.stop - 1] for s in segments])


def _check_assignment(case: Arrays) -> str:
    x, centre_index = tensor(case["x"]), tensor(case["targets"])
    n = x.shape[1]
    centre = torch.zeros(x.shape[:2], dtype=torch.bool).scatter_(1, centre_index, True)
    owner = clusters.assign(tensor(case["dist"]), centre) % n
    rules: tuple[merges.MergeRule, ...] = ("beta", "mean")
    for rule in rules:
        rows = []
        for item, lead, target in zip(x, owner, centre_index, strict=True):
            weight = merges.cluster_weights(lead, rule, 0.6)
            slot = torch.empty(n, dtype=torch.long)
            slot[target] = torch.arange(target.numel())
            rows.append(Plan.merge(target, slot[lead], torch.arange(n), weight, n).apply(item))
        why = differs(f"{rule} merge", torch.stack(rows), case[f"out_{rule}"], **VALUE_TOL)
        if why:
            return why
    return ""


def _check_dynamic(case: Arrays) -> str:
    ratio, contextual, beta, near = (float(v) for v in case["params"])
    x = tensor(case["x"])
    frames, patches, _ = x.shape
    if patches == 0:
        return differs("positions", torch.empty(frames, 0), case["out_pos"])
    windows = Windows.of(
        np.zeros((frames - 1, patches), bool), [Segment(t, t + 1) for t in range(frames)]
    )
    return _check_merges(case, x, windows, ratio, contextual, beta, near, tensor(case["attn"]))


def _check_static(case: Arrays) -> str:
    ratio, beta, near = (float(v) for v in case["params"])
    x = tensor(case["x"])
    twice = x.expand(2, -1, -1)
    windows = Windows.of(np.ones((1, x.shape[1]), bool), [Segment(0, 2)])
    return _check_merges(case, twice, windows, ratio, 0.0, beta, near, torch.zeros(twice.shape[:2]))


def _check_merges(
    case: Arrays,
    x: Tensor,
    windows: Windows,
    ratio: float,
    contextual: float,
    beta: float,
    near: float,
    saliency: Tensor,
) -> str:
    frames, patches, width = x.shape
    grid = PatchGrid(frames, 1, patches)
    flat = x.reshape(-1, width)
    rules: tuple[merges.MergeRule, ...] = ("beta", "mean")
    for rule in rules:
        method = HoliTom(
            merge=rule,
            beta=beta,
            contextual=contextual,
            neighbours=int(near),
            counts="published",
            static_saliency=0.0,
            order="published",
        )
        counts = published_counts(ratio, windows)
        plan = method.assemble(flat, grid, saliency.reshape(-1), windows, *counts)
        shape = case["out_pos"].shape
        position = tensor(case["pos"]).reshape(-1)[plan.anchor]
        if position.numel() != case["out_pos"].size:
            return f"count of tokens: {position.numel()}, expected {case['out_pos'].size}"
        why = differs("positions", position.view(shape), case["out_pos"])
        rows = plan.apply(flat).view(*shape, width)
        why = why or differs(f"{rule} merge", rows, case[f"out_{rule}"], **VALUE_TOL)
        if why:
            return why
    return ""


def _check_split(case: Arrays) -> str:
    x = tensor(case["x"])
    frames, patches, width = x.shape
    segments = [Segment(int(a), int(b) + 1) for a, b in case["segments"]]
    links = (tensor(case["sim"]) > float(case["tau"])).numpy()
    windows = Windows.of(links, segments)
    mean, still = temporal_mean(windows, PatchGrid(frames, 1, patches))
    dynamic = tensor((~windows.static).nonzero()[1])
    n_static = tensor(windows.n_static)
    rows = mean.apply(x.reshape(-1, width))[still]
    return (
        differs("static counts", n_static, case["n_static"])
        or differs("dynamic counts", patches - n_static, case["n_dynamic"])
        or differs("static positions", mean.anchor[still] % patches, case["static_pos"])
        or differs("dynamic positions", dynamic, case["dynamic_pos"])
        or differs("static means", rows, case["static_feat"], **VALUE_TOL)
    )


def _check_newlines(case: Arrays) -> str:
    x, position = tensor(case["x"]), tensor(case["pos"])
    side = int(case["grid"])
    frames = x.shape[0]
    grid = PatchGrid(frames, int(position.max()) // side + 1, side)
    anchor = (torch.arange(frames)[:, None] * grid.per_frame + position).view(-1)
    slots = grids.newline_slots(anchor, grid, "grid")
    out = grids.insert_rows(x.reshape(-1, x.shape[-1]), slots, tensor(case["token"]).view(-1))
    return differs("sequence", out, case["out"], **VALUE_TOL)


def _check_inner(case: Arrays) -> str:
    start, length, drop = case["params"]
    first, last = int(start), int(start) + int(length)
    hidden = tensor(case["hidden"])
    score = tensor(case["attn_last_heads"]).mean(0)[first:last]
    kept = picks.top(score, round((last - first) * (1 - float(drop))))
    absolute = torch.cat([torch.arange(first), kept + first, torch.arange(last, hidden.shape[1])])
    merged = [
        torch.cat(
            [
                item[:first],
                inner_merge.fold(item[first:last], kept).apply(item[first:last]),
                item[last:],
            ]
        )
        for item in hidden
    ]
    return differs("kept positions", absolute, case["kept_pos"]) or differs(
        "states", torch.stack(merged), case["out"], **VALUE_TOL
    )


_CHECKS: dict[str, Callable[[Arrays], str]] = {
    "dpc": _check_dpc,
    "win": _check_windows,
    "clus": _check_assignment,
    "attd": _check_dynamic,
    "dens": _check_static,
    "split": _check_split,
    "nl": _check_newlines,
    "m": _check_inner,
}


def _pipeline_cases(arrays: Arrays) -> Iterator[Case]:
    x = tensor(arrays["features"])
    alike = similarity.adjacent_cosine(x)
    for j in range(len(arrays["combo_ratio"])):
        name = f"c{j:03d}"
        yield from fitting(name, partial(_pipeline_case, name, j, x, alike, arrays))


def _pipeline_case(name: str, j: int, x: Tensor, alike: Tensor, arrays: Arrays) -> list[Case]:
    combo = {key: arrays[key][j] for key in arrays if key.startswith("combo_")}
    scalars = {key: arrays[key][j] for key in ("total_reduced", "corrected_ratio", "seq_len")}
    case = {k[len(name) + 1 :]: arrays[k] for k in arrays if k.startswith(name + "_")}
    return [_check_pipeline(name, x, alike, arrays, combo, scalars, case)]


def _check_pipeline(
    name: str,
    x: Tensor,
    alike: Tensor,
    arrays: Arrays,
    combo: Mapping[str, Any],
    scalars: Mapping[str, Any],
    case: Arrays,
) -> Case:
    frames, patches, width = x.shape
    flat, saliency = x.reshape(-1, width), tensor(arrays["attn"]).reshape(-1)
    links = (alike > float(combo["combo_tau"])).numpy()
    segments, saved = static_windows.segment(links)
    windows = Windows.of(links, segments)
    ratio = corrected_ratio(float(combo["combo_ratio"]), frames * patches, saved)
    static_count, dynamic_count = published_counts(ratio, windows)
    why = (
        differs("segments", _inclusive(segments), case["segments"])
        or ("" if saved == scalars["total_reduced"] else f"saved tokens {saved}")
        or ("" if abs(ratio - scalars["corrected_ratio"]) <= RATIO_ATOL else f"ratio {ratio}")
        or differs("static patches", tensor(windows.n_static), case["n_static_patches"])
        or differs("static tokens", tensor(static_count), case["n_static_tokens"])
        or differs("dynamic tokens", tensor(dynamic_count[windows.start]), case["n_dynamic_tokens"])
    )
    if why:
        return Case(name, "failed", why)

    method = HoliTom(
        contextual=float(combo["combo_D"]),
        merge="mean" if combo["combo_plain_mean"] else "beta",
        counts="published",
        static_saliency=0.0,
        order="published",
    )
    grid = PatchGrid(frames, 1, patches)
    plan = method.assemble(flat, grid, saliency, windows, static_count, dynamic_count)
    of_segment = np.add.reduceat(dynamic_count, windows.start)
    why = _positions_differ(plan, patches, tensor(static_count), tensor(of_segment), case)
    if why:
        return Case(name, "failed", why)
    if not all(bool((case[flag] == 1).all()) for flag in ("sta_stable", "dyn_stable")):
        return Case(name, "skipped")
    sequence = _sequence(plan, flat, patches, bool(combo["combo_grid"]), arrays["newline"])
    if sequence.shape[0] != int(scalars["seq_len"]):
        return Case(name, "failed", f"{sequence.shape[0]} rows, expected {scalars['seq_len']}")
    sketch = sequence.double() @ tensor(arrays["proj"]).double()
    why = differs("sketch", sketch, case["sketch"], atol=SKETCH_ATOL)
    if not why and combo["combo_full"]:
        why = differs("sequence", sequence, case["sequence"], **VALUE_TOL)
    return Case(name, "failed" if why else "passed", why)


def _positions_differ(
    plan: Plan, patches: int, static_count: Tensor, dynamic_count: Tensor, case: Arrays
) -> str:
    """Compare kept positions segment by segment where the reference is stable."""
    sizes = torch.stack([static_count, dynamic_count], 1).view(-1)
    if int(sizes.sum()) != plan.k:
        return f"count of tokens: {plan.k}, expected {int(sizes.sum())}"
    ours = _runs(plan.anchor % patches, sizes)
    for part, (what, flag) in enumerate((("static", "sta_stable"), ("dynamic", "dyn_stable"))):
        counts = (static_count, dynamic_count)[part]
        golden = _runs(tensor(case[f"{what}_pos"]), counts)
        for s, (mine, expected) in enumerate(zip(ours[part::2], golden, strict=True)):
            if case[flag][s] and not torch.equal(mine, expected):
                return f"{what} positions of segment {s} differ"
    return ""


def _runs(x: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
    return x.tensor_split(sizes.cumsum(0)[:-1])


def _sequence(
    plan: Plan, x: Tensor, patches: int, grid_layout: bool, newline: NDArray[Any]
) -> Tensor:
    """The reduced sequence with its newlines, as the reference lays it out."""
    side = int(patches**0.5)
    grid = PatchGrid(x.shape[0] // patches, patches // side, side)
    if grid_layout:
        plan = plan.ascending()
    slots = grids.newline_slots(plan.anchor, grid, "grid" if grid_layout else "one_token")
    return grids.insert_rows(plan.apply(x), slots, tensor(newline))


def temporal_mean(windows: Windows, grid: PatchGrid) -> tuple[Plan, Tensor]:
    """Average each static patch over its window; dynamic patches pass.

    Returns the plan, rows ascending by anchor (a static patch is anchored in its window's first
    frame), and bool [rows], which rows are static.
    """
    token = torch.arange(grid.size)
    still = torch.from_numpy(windows.static[windows.segment]).view(-1)
    start = tensor(windows.start[windows.segment]).repeat_interleave(grid.per_frame)
    first = start * grid.per_frame + token % grid.per_frame
    anchor, row = torch.unique(torch.where(still, first, token), return_inverse=True)
    length = torch.bincount(row)
    return Plan.merge(anchor, row, token, 1.0 / length[row], grid.size), still[anchor]
