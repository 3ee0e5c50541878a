"""A card for the tests of budgets: an affine device with noise, quantiles computed exactly."""

from __future__ import annotations

import numpy as np

from stream.budgets.latency_card import LatencyCard, StageTiming

BUCKETS = (32, 64, 128, 256, 512)
AFFINE_MS = {
    "encode": (12.0, 0.0),
    "reduce": (0.4, 0.0),
    "prefill": (6.0, 0.06),
    "flow_step": (1.5, 0.002),
    "action_head": (0.5, 0.0),
}


def card(
    spread: float = 0.05, count: int = 400, device: str = "test device", seed: int = 0
) -> LatencyCard:
    """spread: standard deviation of the log of a sample."""
    rng = np.random.default_rng(seed)
    rows = [
        StageTiming.of(
            stage, bucket, ((base + slope * bucket) * np.exp(spread * rng.normal(size=count)))
        )
        for stage, (base, slope) in AFFINE_MS.items()
        for bucket in BUCKETS
    ]
    return LatencyCard(
        model="toy-vla",
        device=device,
        threads=2,
        dtype="float32",
        date="2026-11-22",
        shapes={"visual_tokens": (512,), "image": (128, 128, 3)},
        warmup=20,
        seed=seed,
        timings=tuple(rows),
    )
