"""`foveate bench encoder`."""

from __future__ import annotations

import statistics

from ..show import out, print_json, progress_bars, table
from .bench import machine


def encoder(
    share: str,
    refresh: str,
    videos: int,
    frames: int,
    device: str,
    threads: int,
    seed: int,
    as_json: bool,
) -> None:
    """One row for each encoder: work, feature error, and accuracy beside the exact one's."""
    import torch

    from stream.errors import ConfigError

    from ..encoders import scores

    if videos < 1 or frames < 2:
        raise ConfigError(f"{videos} videos of {frames} frames: give at least 1 of at least 2.")
    settings = [(float(s), int(r)) for s in share.split(",") for r in refresh.split(",")]
    if any(not 0 < s <= 1 or r < 1 for s, r in settings):
        raise ConfigError(
            f"share {share}, refresh {refresh}: a share lies above 0 and at most at 1, a refresh "
            "is at least 1 frame."
        )
    torch.set_num_threads(threads)
    with progress_bars({"clips": videos}) as progress:
        found = scores(settings, videos, frames, device, seed, progress)
    rows = []
    for name, score in found.items():
        points, low, high = score.minus(found["exact"], seed)
        computed = statistics.fmean(score.computed)
        rows.append(
            {
                "encoder": name,
                "computed": computed,
                "feature_error": statistics.fmean(score.error),
                "accuracy": score.accuracy,
                "minus_exact": points,
                "low": low,
                "high": high,
            }
        )
    asked = sum(found["exact"].asked)
    if as_json:
        told = {"videos": videos, "frames": frames, "n": asked, "seed": seed}
        print_json({**told, "machine": machine(device), "rows": rows})
        return
    cells = [
        (
            r["encoder"],
            f"{r['computed']:.3f}",
            f"{r['feature_error']:.3f}",
            f"{r['accuracy']:.1f}",
            f"{r['minus_exact']:+.1f} [{r['low']:+.1f}, {r['high']:+.1f}]",
        )
        for r in rows
    ]
    columns = ("encoder", "computed", "feature error", "accuracy %", "minus exact (95 %)")
    title = f"tiny-video, {videos} held-out clips, n = {asked}, {frames} frames, seed {seed}"
    out.print(table(title, columns, cells))
