"""`foveate calibrate`: the latency card of a robot policy on this machine."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ..robot import load_policy
from ..settings import DriveSettings
from ..show import out, print_json, progress_bars, table


def calibrate(
    settings: DriveSettings,
    environment: str,
    path: Path,
    buckets: str | None,
    repeats: int,
    warmup: int,
    as_json: bool,
) -> None:
    """Measure, write, print."""
    import sims
    from sims.calibration import buckets_of, card_of, warm, whole_ms
    from stream.errors import ConfigError

    try:
        wanted = [int(b) for b in buckets.split(",")] if buckets else None
    except ValueError:
        raise ConfigError(f"The buckets {buckets!r} must be token counts like 32,64.") from None
    policy = load_policy(settings)
    tokens = wanted or list(buckets_of(policy.spec.grid.size))
    with sims.make(environment) as world:
        world.reset(settings.seed)
        observation = world.observe()
    warm(policy, observation, tokens)
    with progress_bars({"calibrate": len(tokens) * (repeats + warmup)}) as bars:
        card = card_of(
            policy,
            observation,
            model=f"{settings.model}, {settings.reducer}",
            buckets=tokens,
            repeats=repeats,
            warmup=warmup,
            seed=settings.seed,
            progress=partial(bars, "calibrate"),
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    card.save(path)
    if as_json:
        print_json({"card": str(path), **card.model_dump(mode="json")})
        return
    rows = [
        (row.stage, row.bucket, *(f"{ms:.2f}" for ms in (row.p50_ms, row.p95_ms, row.p99_ms)))
        for row in card.timings
    ]
    rows += [
        ("whole", bucket, f"{whole_ms(card, bucket, policy.spec.steps[-1]):.2f}", "", "")
        for bucket in card.buckets
    ]
    title = f"{card.model} on {card.device}, {card.dtype}, {repeats} samples, warm, interleaved"
    out.print(table(title, ("stage", "tokens", "p50 ms", "p95 ms", "p99 ms"), rows))
    out.print(f"written: {path}")
