"""What the robot commands share: policy, card, clock and controller by their settings."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .settings import DriveSettings, reducer_of
from .show import progress_bars

if TYPE_CHECKING:
    from policies.vla.base import VLAPolicy
    from sims.clock import TimeSource
    from sims.episode import DriveConfig
    from stream.budgets.decision import Controller
    from stream.budgets.latency_card import LatencyCard
    from stream.data import Observation

QUICK_S, LEAST, MOST = 10.0, 5, 20
"""A first calibration: about so many seconds, and samples a bucket within these bounds."""
QUARTER, ROOM = 0.25, 1.3


def load_policy(settings: DriveSettings) -> VLAPolicy:
    """The policy with its reducer. Raises AttachError where it cannot be had."""
    from policies.models import quiet
    from policies.vla import load

    quiet()
    reducer = reducer_of(settings.reducer, **settings.settings)
    return load(settings.model, reducer, settings.device, settings.capture)


@dataclass(frozen=True, slots=True)
class Timing:
    """Whose times a run goes by.

    card: what the controller expects. clock: what happens. note: where the card comes from.
    """

    card: LatencyCard
    clock: TimeSource
    note: str


def timing_of(settings: DriveSettings, policy: VLAPolicy, observation: Observation) -> Timing:
    """The clock that `settings.time` names; on the wall, the policy is warm afterwards.

    Raises ConfigError for anything but wall, card:FILE and ms:TIME.
    """
    from sims.calibration import buckets_of, fitted, warm
    from sims.clock import CardTime, WallTime
    from stream.data import Budget

    label = time_label(settings)
    if settings.time == "wall":
        tokens = policy.spec.grid.size
        warm(
            policy,
            observation,
            {*buckets_of(tokens), Budget.ratio(settings.keep or 1.0, tokens).tokens},
        )
        card, note = own_card(settings, policy, observation)
        if policy.captured is not None and (pool := policy.captured.pool).captured:
            note += f"; {pool.captured} graphs captured in {pool.warmup_s:.1f} s"
        return Timing(card, WallTime(policy.device, label), note)
    card = fitted(_given_card(settings, policy.spec.grid.size), policy.spec.grid.size)
    return Timing(card, CardTime(card, label), settings.time)


def time_label(settings: DriveSettings) -> str:
    """Whose times these are, in words; a card of another device is a latency transplant."""
    import torch

    from sims.calibration import device_name

    default = "cuda" if torch.cuda.is_available() else "cpu"
    device = device_name(torch.device(settings.device or default))
    if settings.time == "wall":
        return f"wall clock, {device}"
    if settings.time.startswith("ms:"):
        return f"stated: {settings.time[3:]} ms"
    return _given_card(settings, 1).label(device)


def _given_card(settings: DriveSettings, tokens: int) -> LatencyCard:
    """The card of a file or of stated times; tokens: the bucket of a single stated time."""
    from sims.clock import check_card, stated_card
    from stream.budgets.latency_card import LatencyCard
    from stream.errors import ConfigError

    kind, _, what = settings.time.partition(":")
    if kind == "card" and what:
        return check_card(LatencyCard.load(what), what)
    if kind == "ms" and what:
        return stated_card(what, tokens)
    raise ConfigError(
        f"The time {settings.time!r} is none of wall, card:FILE, ms:60, ms:64=30,512=90."
    )


def own_card(
    settings: DriveSettings, policy: VLAPolicy, observation: Observation
) -> tuple[LatencyCard, str]:
    """The card of this policy on this machine, and where it comes from; made when there is none."""
    from sims.calibration import Measure, buckets_of, card_of, device_name
    from stream.budgets.latency_card import LatencyCard

    device = device_name(policy.device)
    name = f"{settings.model}, {settings.reducer}"
    given = repr(sorted(settings.settings.items())), f"captured: {policy.captured is not None}"
    key = "\n".join([name, *given, device, repr(policy.spec)])
    path = cache_folder() / "cards" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if path.is_file():
        return LatencyCard.load(path), f"card of {path}; delete it to calibrate again"
    buckets = buckets_of(policy.spec.grid.size)
    measure, began = Measure(policy, observation), time.perf_counter()
    for bucket in buckets:
        measure(bucket)
    repeats = int(QUICK_S / (time.perf_counter() - began))
    repeats = min(max(repeats, LEAST), MOST)
    with progress_bars({"calibrate": len(buckets) * (repeats + 1)}) as bars:
        card = card_of(
            policy,
            observation,
            model=name,
            buckets=buckets,
            repeats=repeats,
            warmup=1,
            progress=partial(bars, "calibrate"),
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    card.save(path)
    return card, f"calibrated just now, {repeats} samples a bucket; kept in {path}"


def cache_folder() -> Path:
    """Where cards are kept between runs: FOVEATE_CACHE, or the user's cache folder."""
    named = os.environ.get("FOVEATE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(base) / "foveate"


def budget_of(settings: DriveSettings, card: LatencyCard, policy: VLAPolicy) -> float | None:
    """The stated budget; without one, room for a quarter of the tokens where the world moves on."""
    from sims.calibration import buckets_of, whole_ms

    if settings.budget_ms is not None or settings.mode == "waiting":
        return settings.budget_ms
    quarter = buckets_of(policy.spec.grid.size, [QUARTER])[0]
    nearest = min(card.buckets, key=lambda bucket: abs(bucket - quarter))
    return round(ROOM * whole_ms(card, nearest, policy.spec.steps[-1]), 1)


def controller_of(settings: DriveSettings, card: LatencyCard, policy: VLAPolicy) -> Controller[Any]:
    """The deadline controller, or a fixed share of the tokens."""
    from sims.calibration import device_name
    from sims.clock import STAGES
    from stream.budgets.baselines import FixedController
    from stream.budgets.controller import ControllerConfig, DeadlineController
    from stream.data import Budget

    steps = policy.spec.steps
    if settings.keep is not None:
        tokens = Budget.ratio(settings.keep, policy.spec.grid.size).tokens
        return FixedController(tokens=tokens, steps=steps[-1])
    allowed = ControllerConfig(
        floor_tokens=settings.floor_tokens, steps=steps, stop_after=settings.stop_after
    )
    return DeadlineController.of(card, STAGES, device_name(policy.device), allowed)


def drive_config(settings: DriveSettings, budget_ms: float | None) -> DriveConfig:
    from sims.episode import DriveConfig

    return DriveConfig(
        mode=settings.mode,
        budget_ms=budget_ms,
        align=settings.align,
        stop_after=settings.stop_after,
    )
