"""Watched streams as a rerun recording: frames with kept and merged patches, the ribbon of
segments, tokens a second, lag, answers."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stream.data import PatchGrid
from stream.errors import ConfigError
from stream.sources.live_values import LiveFrame

from .patch_paint import Fates, paint_frame

TIMELINE = "media_time"
_FRAMES_KEPT = 256
_SIDE_PX = 448
_CURVES = ("tokens_per_s", "encoded_fps", "lag_p50_s", "lag_p95_s", "dropped", "gated")


class RerunStream:
    """Writes an .rrd file for `rerun FILE`; a `Listener` of a Watcher.

    Painted frames appear when their part reaches the model. Raises ConfigError for a name that
    does not end in .rrd.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix.lower() != ".rrd":
            raise ConfigError(f"Rerun cannot write to {path.name!r}; name it .rrd.")
        import rerun

        path.parent.mkdir(parents=True, exist_ok=True)
        self._rerun = rerun
        self._to = rerun.RecordingStream("foveate", recording_id=path.stem)
        self._to.save(path)
        self._frames: dict[str, deque[LiveFrame]] = {}
        self._now_s: dict[str, float] = {}

    def saw(self, stream: str, got: LiveFrame) -> None:
        self._frames.setdefault(stream, deque(maxlen=_FRAMES_KEPT)).append(got)
        self._now_s[stream] = got.frame.pts_s

    def told(self, row: Mapping[str, Any]) -> None:
        stream, kind = str(row["stream"]), row["kind"]
        self._at(float(row.get("pts_s", self._now_s.get(stream, 0.0))))
        if kind == "part":
            self._part(stream, row)
        elif kind == "status":
            for name in _CURVES:
                self._log(f"{stream}/{name}", self._rerun.Scalars(float(row[name])))
        elif kind == "answer":
            self._text(stream, f"{row['question']} {row['answer']}", "INFO")
        elif kind in ("gap", "phase", "waiting", "end"):
            said = row.get("said") or ", ".join(row.get("causes", ()))
            self._text(stream, f"{kind}: {said}", "WARN")

    def close(self) -> None:
        self._to.disconnect()

    def _part(self, stream: str, row: Mapping[str, Any]) -> None:
        grid = PatchGrid(*row["grid"])
        fates = Fates.of(row["plan"], grid)
        pictures = {f.frame.pts_s: f.frame.image for f in self._frames.get(stream, ())}
        side = max(4, _SIDE_PX // max(grid.rows, grid.cols))
        starts = {start for start, _ in row["segments"]}
        for t, pts_s in enumerate(row["frames_s"]):
            self._at(pts_s)
            self._log(f"{stream}/tokens_in_frame", self._rerun.Scalars(float(fates.tokens[t])))
            self._log(f"{stream}/segment_starts", self._rerun.Scalars(float(t in starts)))
            if pts_s in pictures:
                view = paint_frame(pictures[pts_s], t, fates, (side, side))
                image = self._rerun.Image(view).compress(jpeg_quality=85)
                self._log(f"{stream}/frame", image)

    def _text(self, stream: str, text: str, level: str) -> None:
        self._log(f"{stream}/log", self._rerun.TextLog(text, level=level))

    def _at(self, pts_s: float) -> None:
        self._to.set_time(TIMELINE, duration=pts_s)

    def _log(self, path: str, what: Any) -> None:
        self._to.log(path, what)
