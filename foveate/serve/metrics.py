"""What the server counts, in Prometheus' form."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from .answering import Outcome
    from .streams import Streams

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
    """under_way: requests that wait or are worked on."""

    def __init__(self, streams: Streams, under_way: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._stages: dict[str, Quantiles] = {}
        self._requests = Counter(
            "foveate_requests", "Requests by status.", ["path", "status"], registry=self._registry
        )
        self._tokens = Counter(
            "foveate_answer_tokens",
            "Tokens of answered requests: visual ones before and after, text read, text written.",
            ["kind"],
            registry=self._registry,
        )
        self._registry.register(_Now(streams, under_way, self._stages))

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
            self._stages.setdefault(stage, Quantiles()).add(ms / 1e3)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Now(Collector):
    """What is read off when it is asked for."""

    def __init__(
        self,
        streams: Streams,
        under_way: Callable[[], int],
        stages: Mapping[str, Quantiles],
    ) -> None:
        self._streams, self._under_way, self._stages = streams, under_way, stages

    def collect(self) -> Iterator[Metric]:
        rows = self._streams.rows()
        yield GaugeMetricFamily(
            "foveate_requests_under_way", "Requests waiting or worked on.", self._under_way()
        )
        yield GaugeMetricFamily("foveate_streams", "Attached streams.", len(rows))
        age = GaugeMetricFamily(
            "foveate_stream_frame_age_seconds", "Age of the newest frame.", labels=["stream"]
        )
        live = GaugeMetricFamily("foveate_stream_live", "1 while pictures come.", labels=["stream"])
        for row in rows:
            live.add_metric([row["name"]], float(row["phase"] == "live"))
            if row["frame_age_s"] is not None:
                age.add_metric([row["name"]], row["frame_age_s"])
        yield from (age, live)
        for key, said in _PER_STREAM.items():
            family = CounterMetricFamily(f"foveate_stream_{key}", said, labels=["stream"])
            for row in rows:
                family.add_metric([row["name"]], row["counts"][key])
            yield family
        yield _summary(
            "foveate_stream_lag_seconds",
            "From a frame's arrival until it is taken in.",
            "stream",
            self._streams.lags(),
        )
        yield _summary(
            "foveate_turn_stage_seconds",
            "Time of each stage when frames of streams are taken in.",
            "stage",
            self._streams.stages,
        )
        yield _summary(
            "foveate_stage_seconds", "Time of each stage of an answer.", "stage", self._stages
        )


def _summary(name: str, said: str, label: str, seen: Mapping[str, Quantiles]) -> Metric:
    """prometheus_client's own summaries have no quantiles."""
    summary = Metric(name, said, "summary")
    for key, values in list(seen.items()):
        for quantile, value in values.values().items():
            summary.add_sample(name, {label: key, "quantile": quantile}, value)
        summary.add_sample(f"{name}_sum", {label: key}, values.sum)
        summary.add_sample(f"{name}_count", {label: key}, values.count)
    return summary
