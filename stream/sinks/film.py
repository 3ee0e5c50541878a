"""A quick look: an mp4 in the episode's own time, one picture for each tick."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..errors import ConfigError
from ..ticks import Tick
from .base import TickSink
from .tick_paint import caption, painted

SIDE_PX, LINE_PX = 256, 22
PAGE, INK, ALARM = (17, 20, 24), (236, 239, 244), (255, 120, 90)
PAUSE_S = 0.5


class Film(TickSink):
    """Cameras side by side with their kept patches, instruction above, figures below.

    Episodes follow each other. Raises ConfigError for a name that does not end in .mp4.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix.lower() != ".mp4":
            raise ConfigError(f"The film cannot be written to {path.name!r}; name it .mp4.")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = av.open(str(path), "w", format="mp4")
        self._stream = self._file.add_stream("libx264", rate=60)
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": "18", "preset": "veryfast"}
        self._stream.codec_context.time_base = Fraction(1, 1000)
        self._start_s = self._end_s = 0.0
        self._last: Image.Image | None = None

    def begin(self, about: Mapping[str, Any]) -> None:
        self._cameras = tuple(about["cameras"])
        self._dt_s = float(about["dt_s"])
        self._start_s = self._end_s

    def write(self, tick: Tick) -> None:
        self._last = self._page(tick)
        self._put(self._last, self._start_s + tick.time_s)
        self._end_s = self._start_s + tick.time_s + self._dt_s * max(1, len(tick.executed))

    def end(self, summary: Mapping[str, Any]) -> None:
        """The last picture stays for a moment, with the result on it."""
        if self._last is not None:
            result = "solved" if summary.get("success") else "not solved"
            pen = ImageDraw.Draw(self._last)
            pen.text((self._last.width - 6, 4), result, INK, _font(), anchor="ra")
            self._put(self._last, self._end_s)
            self._end_s += PAUSE_S
            self._put(self._last, self._end_s)
            self._end_s += self._dt_s

    def close(self) -> None:
        if self._last is not None:
            self._file.mux(self._stream.encode())
        self._file.close()

    def _page(self, tick: Tick) -> Image.Image:
        views = painted(tick, SIDE_PX)
        width = (SIDE_PX + 4) * len(self._cameras)
        page = Image.new("RGB", (max(width, 520), SIDE_PX + 3 * LINE_PX), PAGE)
        pen = ImageDraw.Draw(page)
        pen.text((6, 4), tick.instruction, INK, _font())
        for i, camera in enumerate(self._cameras):
            view = views.get(camera)
            if view is None:
                pen.text((i * (SIDE_PX + 4) + 6, SIDE_PX // 2), f"no picture: {camera}", ALARM)
                continue
            picture = Image.fromarray(view).resize((SIDE_PX, SIDE_PX))
            page.paste(picture, (i * (SIDE_PX + 4), LINE_PX))
        pen.text((6, SIDE_PX + LINE_PX + 4), caption(tick), ALARM if tick.late else INK, _font())
        why = "; ".join(tick.said) or tick.decision.why
        pen.text((6, SIDE_PX + 2 * LINE_PX + 2), why[:90], INK, _font(11))
        return page

    def _put(self, page: Image.Image, time_s: float) -> None:
        self._stream.width, self._stream.height = page.size
        frame = av.VideoFrame.from_ndarray(np.asarray(page), format="rgb24")
        frame.pts, frame.time_base = round(time_s * 1000), Fraction(1, 1000)
        self._file.mux(self._stream.encode(frame))


def _font(size: int = 13) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
