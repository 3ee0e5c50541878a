"""Choosing tokens never waits for the device: shapes are known on the host.

Tensors on the device `meta` have shapes and no values, so whatever would ask for a value raises.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from stream.data import Budget, PatchGrid, VisualTokens
from stream.memory import Memory
from stream.ops import picks
from stream.reducers.holitom import HoliTom
from stream.registry import build_reducer
from stream.segmenters import static_windows
from stream.segmenters.static_layout import exact_counts, published_counts, split_to_fit
from stream.signals import Signal, Signals

GRID = PatchGrid(8, 7, 7)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"contextual": 0.5},
        {"contextual": 1.0, "counts": "published", "order": "published", "merge": "mean"},
    ],
)
def test_holitom_behind_its_segments(settings: dict[str, Any]) -> None:
    links = np.random.default_rng(0).random((7, 49)) < 0.8
    windows = split_to_fit(links, static_windows.segment(links, 4)[0], 50)
    method = HoliTom(**settings)
    published = method.counts == "published"
    counts = published_counts(0.2, windows) if published else exact_counts(50, windows)
    assert int(counts[0].sum()) > 0
    x = torch.empty(GRID.size, 16, dtype=torch.bfloat16, device="meta")
    saliency = torch.empty(GRID.size, device="meta")
    plan = method.assemble(x, GRID, saliency, windows, *counts)
    assert plan.apply(x).shape == (int(counts[0].sum() + counts[1].sum()), 16)


@pytest.mark.parametrize("name", ["fastv", "inner_merge", "saliency", "vla_pruner"])
def test_reducers_inside_a_captured_graph(name: str) -> None:
    x = torch.empty(GRID.size, 8, device="meta")
    tokens = VisualTokens.full(x, GRID, (0.0,) * GRID.frames)
    score = torch.empty(GRID.size, device="meta")
    given = dict.fromkeys(Signal, score) | {Signal.INPUT_EMBEDDINGS: x}
    plan = build_reducer(name).plan(tokens, Signals(given), Budget(20), Memory())
    assert plan.apply(x).shape == (20, 8)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_places_are_the_true_ones_in_order(share: float) -> None:
    mask = torch.rand(50) < share
    assert torch.equal(picks.places(mask, int(mask.sum())), mask.nonzero().squeeze(-1))
