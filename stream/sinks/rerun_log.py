"""Episodes as a rerun recording: cameras with kept patches, budget and latency curves, text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..ticks import Tick
from .base import TickSink
from .tick_paint import caption, painted

TIMELINE = "episode_time"


class RerunLog(TickSink):
    """Writes an .rrd file for `rerun FILE`; episode n lies under /episode_n.

    Raises ConfigError for a name that does not end in .rrd.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix.lower() != ".rrd":
            raise ConfigError(f"Rerun cannot write to {path.name!r}; name it .rrd.")
        import rerun

        path.parent.mkdir(parents=True, exist_ok=True)
        self._rerun = rerun
        self._stream = rerun.RecordingStream("foveate", recording_id=path.stem)
        self._stream.save(path)
        self._episodes = 0

    def begin(self, about: Mapping[str, Any]) -> None:
        self._root = f"episode_{self._episodes}"
        self._episodes += 1
        lines = "\n".join(f"{key}: {value}" for key, value in about.items())
        self._stream.set_time(TIMELINE, duration=0.0)
        self._log("about", self._rerun.TextDocument(lines))

    def write(self, tick: Tick) -> None:
        rerun, decision = self._rerun, tick.decision
        self._stream.set_time(TIMELINE, duration=tick.time_s)
        for camera, view in painted(tick).items():
            if view is not None:
                self._log(f"camera/{camera}", rerun.Image(view).compress(jpeg_quality=90))
        curves = {
            "latency/took_ms": tick.elapsed_ms,
            "latency/deadline_ms": tick.deadline_ms,
            "latency/predicted_ms": tick.predicted_ms,
            "tokens/used": float(decision.tokens),
            "tokens/steps": float(decision.steps),
            "robot/held": float(tick.held),
            "robot/score": tick.score,
        }
        for name, value in curves.items():
            if value is not None and math.isfinite(value):
                self._log(name, rerun.Scalars(value))
        level = "WARN" if tick.late else "INFO"
        text = "; ".join((caption(tick), decision.why, *decision.gave_up, *tick.said))
        self._log("log", rerun.TextLog(text, level=level))
        if tick.number == 0:
            self._log("log", rerun.TextLog(tick.instruction))

    def end(self, summary: Mapping[str, Any]) -> None:
        lines = "\n".join(f"{key}: {value}" for key, value in summary.items())
        self._log("summary", self._rerun.TextDocument(lines))

    def close(self) -> None:
        self._stream.disconnect()

    def _log(self, path: str, what: Any) -> None:
        self._stream.log(f"{self._root}/{path}", what)
