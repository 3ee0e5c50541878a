"""How attached streams bear up: an hour at accelerated pace, four cameras on one machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from stream.live.feeds import LiveFeed, open_feed
from stream.live.session import Model, Session
from stream.live.values import StreamConfig
from stream.live.watching import Questions, Watcher
from stream.reducers.base import Reducer
from stream.sources.live_values import End, LiveSettings, Policy
from stream.sources.survey import rss_mib

QUESTION = "What color is the star?"
ASK_EVERY = 32
"""Frames between two questions of a long run: they meet every length of what waits."""

LONG_FPS = 25 / 3
"""30,000 frames an hour."""

Progress = Callable[[str, int], None]


def long_run(
    model: Model, reducer: Reducer, frames: int, archive_mib: float, progress: Progress
) -> Iterator[dict[str, Any]]:
    """Every frame of FFmpeg's moving test picture through the whole path, as fast as it goes; one
    row a minute of media: resident memory, and the time to a question's first token, median and
    quartiles of those asked in that minute.
    """
    address = f"lavfi:testsrc2=size=224x224:rate=25/3:duration={frames * 3 / 25 + 1:g}"
    feed = LiveFeed(address, None, LiveSettings(policy="block"))
    session = Session(model, reducer)
    config = StreamConfig(
        fps=None, gate_level=0.0, tokens_per_s=245.0, archive_mib=archive_mib, burst_s=4.0
    )
    session.attach("hour", config)
    minute, done, began_s = 1, 0, time.monotonic()
    asked: list[float] = []
    while done < frames and not isinstance(got := feed.take(10.0), End):
        arrived = (got if isinstance(got, list) else [])[: frames - done]
        session.step({"hour": arrived})
        if done // ASK_EVERY < (done + len(arrived)) // ASK_EVERY or done + len(arrived) == frames:
            asked.append(session.ask("hour", [QUESTION]).reply.timings_ms["prefill"])
        done += len(arrived)
        progress("frames", done)
        if done >= min(frames, minute * 60 * LONG_FPS):
            low, middle, high = np.quantile(asked, [0.25, 0.5, 0.75])
            yield {
                "media_s": done / LONG_FPS,
                "frames": session.counts("hour").encoded,
                "rss_mib": rss_mib(),
                "first_token_ms": float(middle),
                "q25_ms": float(low),
                "q75_ms": float(high),
                "asked": len(asked),
                "tokens_out": session.counts("hour").tokens_out,
                "elapsed_s": time.monotonic() - began_s,
            }
            minute, asked = minute + 1, []
    feed.close()


def hour_verdict(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Memory at the end against minute 10, latency at the end against minute 5, in percent."""
    by_minute = {round(r["media_s"] / 60): r for r in rows}
    last = rows[-1]
    verdict = {}
    if 10 in by_minute:
        verdict["rss_growth_pct"] = 100 * (last["rss_mib"] / by_minute[10]["rss_mib"] - 1)
    if 5 in by_minute:
        early = by_minute[5]["first_token_ms"]
        verdict["latency_growth_pct"] = 100 * (last["first_token_ms"] / early - 1)
    return verdict


def cameras(
    model: Model,
    reducer: Reducer,
    policies: list[Policy],
    seconds: float,
    fps: float,
    count: int = 4,
) -> Iterator[dict[str, Any]]:
    """`count` moving cameras in real time under each drop policy: one row a camera."""
    for policy in policies:
        session = Session(model, reducer)
        settings = LiveSettings(policy=policy)
        names = [f"cam{i}" for i in range(count)]
        for name in names:
            session.attach(name, StreamConfig(fps=fps, gate_level=0.0))
        address = f"lavfi:testsrc2=size=320x240:rate=15:duration={seconds + 60:g}"
        address += ",realtime"
        feeds = {name: open_feed(address, fps, settings) for name in names}
        watcher = Watcher(session, feeds, Questions(status_s=1e9))
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            for _ in watcher.turn():
                pass
        for name in names:
            status = watcher.status(name)
            source = status.pop("source")
            yield {
                "policy": policy,
                "camera": name,
                "source_fps": source["frames_decoded"] / seconds,
                "source_dropped": source["frames_dropped"],
                **{k: status[k] for k in ("encoded_fps", "lag_p50_s", "lag_p95_s", "lag_p99_s")},
                "encoded": status["encoded"],
            }
        watcher.close()


def fairness(rates: list[float]) -> float:
    """Jain's index: 1 where all get the same, 1/n where one gets everything."""
    square = sum(r * r for r in rates)
    return sum(rates) ** 2 / (len(rates) * square) if square else 1.0
