"""How a live source bears up over time, as plain numbers."""

from __future__ import annotations

import time
from array import array
from typing import Any

from .live import Live
from .live_values import End, LiveFrame, LiveSettings
from .survey import rss_mib


def soak(
    address: str, seconds: float, settings: LiveSettings | None = None, *, pause_s: float = 0.0
) -> dict[str, Any]:
    """Take frames for `seconds` and say what came. Raises SourceError for an impossible address.

    pause_s: how long the consumer is busy with each frame.
    fps_in counts decoded frames, fps_out delivered ones, both over the time since the first frame;
    ages are from the arrival of a frame's data to its delivery; rss_start_mib is taken at the first
    frame. silences: how often none came for `silent_s`.
    """
    ages = array("d")
    silences = 0
    first_s = attach_s = rss_start_mib = None
    began_s = time.monotonic()
    with Live(address, settings) as source:
        while (left_s := began_s + seconds - time.monotonic()) > 0:
            got = source.take(min(left_s, source.settings.silent_s))
            if isinstance(got, End):
                break
            if not isinstance(got, LiveFrame):
                silences += time.monotonic() < began_s + seconds
                continue
            now_s = time.monotonic()
            ages.append(got.age_s(now_s))
            if first_s is None:
                first_s, attach_s, rss_start_mib = now_s, now_s - began_s, rss_mib()
            del got
            time.sleep(pause_s)
        stats = source.stats
        lasted_s = 0.0 if first_s is None else time.monotonic() - first_s
    ages_s = sorted(ages)
    return {
        **stats.as_dict(),
        "seconds": lasted_s,
        "attach_s": attach_s,
        "fps_in": stats.frames_decoded / lasted_s if lasted_s else 0.0,
        "fps_out": stats.frames_delivered / lasted_s if lasted_s else 0.0,
        "age_p50_s": ages_s[len(ages_s) // 2] if ages_s else None,
        "age_max_s": ages_s[-1] if ages_s else None,
        "silences": silences,
        "rss_start_mib": rss_start_mib,
        "rss_end_mib": rss_mib(),
    }
