"""What the server counts, in Prometheus' form."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from .answering import Outcome

_QUANTILES = (0.5, 0.95, 0.99)
_KEPT = 1024

_PER_STREAM = {
    "frames": "Frames decoded.",
    "gated": "Frames not encoded because nothing had changed.",
    "dropped": "Frames dropped because nobody had taken them yet.",
    "encoded": "Frames encoded.",
    "gaps": "Frames that did not follow the one before.",
    "reconnects": "Connections made anew.",
    "segments": "Segments that reached the model.",
    "tokens_in": "Visual tokens encoded.",
    "tokens_out": "Visual tokens that reached the model.",
}


class Quantiles:
    """Of the latest 1024 values; sum and count are of all."""

    def __init__(self) -> None:
        self._latest: deque[float] = deque(maxlen=_KEPT)
        self.sum, self.count = 0.0, 0

    def add(self, value: float) -> None:
        self._latest.append(value)
        self.sum += value
        self.count += 1

    def values(self) -> dict[str, float]:
        """Quantile -> value; empty where nothing was added."""
        latest = list(self._latest)
        if not latest:
            return {}
        found = np.quantile(latest, _QUANTILES)
        return {str(q): float(v) for q, v in zip(_QUANTILES, found, strict=True)}


class Metrics:
    """rows: how the attached streams fare. under_way: requests that wait or are worked on."""

    def __init__(
        self, rows: Callable[[], list[dict[str, Any]]], under_way: Callable[[], int]
    ) -> None:
        self._registry = CollectorRegistry()
        self.stages: dict[str, Quantiles] = {}
        self._requests = Counter(
            "foveate_requests", "Requests by status.", ["path", "status"], registry=self._registry
        )
        self._tokens = Counter(
            "foveate_answer_tokens",
            "Tokens of answered requests: visual ones before and after, text read, text written.",
            ["kind"],
            registry=self._registry,
        )
        self._registry.register(_Now(rows, under_way, self.stages))

    def requested(self, path: str, status: int) -> None:
        self._requests.labels(path, str(status)).inc()

    def answered(self, outcome: Outcome) -> None:
        kinds = {
            "visual_in": outcome.tokens_in,
            "visual_out": outcome.tokens_out,
            "text_in": outcome.text_tokens,
            "text_out": outcome.new_tokens,
        }
        for kind, count in kinds.items():
            self._tokens.labels(kind).inc(count)
        for stage, ms in outcome.timings_ms.items():
            self.stages.setdefault(stage, Quantiles()).add(ms / 1e3)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Now(Collector):
    """What is read off when it is asked for."""

    def __init__(
        self,
        rows: Callable[[], list[dict[str, Any]]],
        under_way: Callable[[], int],
        stages: Mapping[str, Quantiles],
    ) -> None:
        self._rows, self._under_way, self._stages = rows, under_way, stages

    def collect(self) -> Iterable[Metric]:
        rows = self._rows()
        waiting = GaugeMetricFamily("foveate_requests_under_way", "Requests waiting or worked on.")
        waiting.add_metric([], self._under_way())
        streams = GaugeMetricFamily("foveate_streams", "Attached streams.")
        streams.add_metric([], len(rows))
        age = GaugeMetricFamily(
            "foveate_stream_frame_age_seconds", "Age of the newest frame.", labels=["stream"]
        )
        live = GaugeMetricFamily("foveate_stream_live", "1 while pictures come.", labels=["stream"])
        for row in rows:
            live.add_metric([row["name"]], float(row["phase"] == "live"))
            if row["frame_age_s"] is not None:
                age.add_metric([row["name"]], row["frame_age_s"])
        yield from (waiting, streams, age, live)
        for key, said in _PER_STREAM.items():
            family = CounterMetricFamily(f"foveate_stream_{key}", said, labels=["stream"])
            for row in rows:
                family.add_metric([row["name"]], row["counts"][key])
            yield family
        lag = Metric(
            "foveate_stream_lag_seconds", "From a frame's arrival until it is taken in.", "summary"
        )
        for row in rows:
            for quantile, value in row["lag_s"].items():
                lag.add_sample(lag.name, {"stream": row["name"], "quantile": quantile}, value)
        yield lag
        stages = Metric("foveate_stage_seconds", "Time of each stage of an answer.", "summary")
        for stage, seen in list(self._stages.items()):
            for quantile, value in seen.values().items():
                stages.add_sample(stages.name, {"stage": stage, "quantile": quantile}, value)
            stages.add_sample(f"{stages.name}_sum", {"stage": stage}, seen.sum)
            stages.add_sample(f"{stages.name}_count", {"stage": stage}, seen.count)
        yield stages
