"""Latency cards of robot policies: made here, or of another device and fitted to this policy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path

import torch

from policies.vla.base import VLAPolicy
from stream.budgets.latency_card import LatencyCard, calibrate
from stream.data import Budget, Observation
from stream.errors import ConfigError
from stream.memory import Memory

from .clock import ENCODE, STAGES, WallTime

SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625)
PERIOD_S = 0.1
WARM_ROUNDS = 4
"""More than a method may need to know its past and to begin to prune."""


def buckets_of(tokens: int, shares: Sequence[float] = SHARES) -> tuple[int, ...]:
    """Token counts of shares of all `tokens`, ascending, each once."""
    return tuple(sorted({Budget.ratio(share, tokens).tokens for share in shares}))


class Measure:
    """Runs a policy once at a bucket, on one observation, as an episode does; a `calibrate`
    measurement. The memory fills as in an episode, so that the reducer does its usual work.

    progress: is told how many runs are done.
    """

    def __init__(
        self,
        policy: VLAPolicy,
        observation: Observation,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._policy, self._observation, self._progress = policy, observation, progress
        self._clock, self._memory, self._calls = WallTime(policy.device), Memory(), 0

    def __call__(self, bucket: int) -> Mapping[str, float]:
        policy, steps = self._policy, self._policy.spec.steps[-1]
        self._calls += 1
        seen = replace(self._observation, time_s=self._calls * PERIOD_S)
        run = partial(self._clock.run, tokens=bucket, repeats=1, level=0.0)
        scene, encode_ms = run(ENCODE, call=lambda: policy.encode(seen))
        budget = Budget(min(bucket, scene.x.shape[0]))
        prefix, prefill_ms = run(
            "prefill", call=lambda: policy.prefill(scene, budget, self._memory)
        )

        def act() -> None:
            _, attention = policy.act(prefix, seen, steps, self._calls)
            policy.remember(prefix, attention, self._memory)

        _, act_ms = run("act", call=act)
        if self._progress:
            self._progress(self._calls)
        return {ENCODE: encode_ms, "prefill": prefill_ms, "act": act_ms / steps}


def warm(policy: VLAPolicy, observation: Observation, buckets: Iterable[int]) -> None:
    """Run a policy at every bucket, so that nothing is built while a clock runs.

    A captured shape costs about three passes, once. No other shape is captured afterwards: where a
    camera fails or an instruction is longer, the policy runs as it stands.
    """
    measure = Measure(policy, observation)
    if policy.captured is not None:
        policy.captured.pool.open = True
    for bucket in sorted(buckets) * WARM_ROUNDS:
        measure(bucket)
    if policy.captured is not None:
        policy.captured.pool.open = False


def card_of(
    policy: VLAPolicy,
    observation: Observation,
    *,
    model: str,
    buckets: Sequence[int] | None = None,
    repeats: int = 200,
    warmup: int = 20,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> LatencyCard:
    """Measure a policy here: warm, buckets interleaved.

    model: what the card calls it; say the reducer as well, its work is part of the prefill.
    """
    spec = policy.spec
    wanted = tuple(buckets or buckets_of(spec.grid.size))
    if max(wanted) > spec.grid.size:
        raise ConfigError(
            f"Bucket {max(wanted)} is above the {spec.grid.size} visual tokens of {spec.name}."
        )
    timings = calibrate(
        Measure(policy, observation, progress),
        wanted,
        (ENCODE, *STAGES.names),
        repeats=repeats,
        warmup=warmup,
        seed=seed,
    )
    pictures = [image.shape for image in observation.images.values() if image is not None]
    return LatencyCard(
        model=model,
        device=device_name(policy.device),
        threads=torch.get_num_threads(),
        dtype=str(policy.encode(observation).x.dtype).removeprefix("torch."),
        date=date.today().isoformat(),
        shapes={
            "visual_tokens": (spec.grid.size,),
            "cameras": (len(pictures),),
            "image": pictures[0],
            "chunk": (spec.chunk, spec.action_size),
            "steps": spec.steps,
        },
        warmup=warmup,
        seed=seed,
        timings=timings,
    )


def fitted(card: LatencyCard, tokens: int) -> LatencyCard:
    """A card whose buckets are shares of `tokens`, for a policy with another number of them.

    A transplant asks what this policy would do under that latency, so shares correspond.
    """
    most = card.buckets[-1]
    if most == tokens:
        return card
    rows = [
        row.model_copy(update={"bucket": Budget.ratio(row.bucket / most, tokens).tokens})
        for row in card.timings
    ]
    model = f"{card.model}, {most} tokens as {tokens}"
    return LatencyCard.model_validate(
        card.model_copy(update={"timings": tuple(rows), "model": model}).model_dump()
    )


def whole_ms(card: LatencyCard, bucket: int, steps: int = 1) -> float:
    """Median of a whole inference at a bucket, encoder included."""
    return sum(
        card.row(stage, bucket).p50_ms * (steps if stage == STAGES.step else 1)
        for stage in (ENCODE, *STAGES.names)
    )


def device_name(device: torch.device) -> str:
    """The GPU's own name, or the CPU's with the threads that torch may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(ln.split(":", 1)[1].strip() for ln in lines if ln.startswith("model name"))
    except (OSError, StopIteration):
        name = "CPU"
    return f"{name}, {torch.get_num_threads()} threads"
