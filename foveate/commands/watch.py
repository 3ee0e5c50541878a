"""`foveate watch`: cameras, questions, answers with their age, until Ctrl-C."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from policies.graphs.wanted import Capture
from stream.config import Config
from stream.errors import ConfigError
from stream.live.values import StreamConfig
from stream.sources.live_values import LiveSettings

from ..settings import AskConfig, reducer_of
from ..show import out
from .ask import load_reasoner

if TYPE_CHECKING:
    from stream.live.feeds import Feed
    from stream.live.session import Session
    from stream.live.watching import Questions, Watcher


class WatchConfig(Config):
    """Streams and the model behind them.

    shared_tokens_per_s: one budget for all streams, `floor` of it in equal parts, the rest by
    novelty; else each has `stream.tokens_per_s`. stale_s: an answer from older frames says so.
    capture: as in AskConfig.
    """

    model: str = "tiny-video"
    reducer: str = "holitom_outer"
    settings: dict[str, Any] = Field(default_factory=dict)
    positions: Literal["keep", "renumber"] = "keep"
    capture: Capture = "auto"
    runner: Literal["ray", "inline"] = "ray"
    device: str | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] = 16
    shared_tokens_per_s: Annotated[float, Field(gt=0)] | None = None
    floor: Annotated[float, Field(gt=0, le=1)] = 0.5
    stale_s: Annotated[float, Field(gt=0)] = 2.0
    stream: StreamConfig = StreamConfig()
    source: LiveSettings = LiveSettings()


def watch(
    sources: list[str],
    config: WatchConfig,
    questions: Questions,
    seconds: float | None,
    jsonl: Path | None,
    record: Path | None,
    rerun: Path | None,
    archive: Path | None,
    as_json: bool,
) -> None:
    """Until the sources end, `seconds` passed, or Ctrl-C; everything told so far is written.

    as_json: one JSON line for each that a person would read.
    """
    from stream.live.watching import Listener, Watcher

    names = names_of(sources)
    with ExitStack() as stack:
        listeners: list[Listener] = []
        if record is not None:
            from stream.live.record import Recorder

            listeners.append(stack.enter_context(closing(Recorder(record, header(names, config)))))
        if rerun is not None:
            from stream.sinks.rerun_stream import RerunStream

            listeners.append(stack.enter_context(closing(RerunStream(rerun))))
        lines = stack.enter_context(jsonl.open("a")) if jsonl is not None else None
        feeds = open_feeds(names, config, stack)
        session = attach(names, config, archive)
        watcher = Watcher(session, feeds, questions, listeners)
        stack.callback(watcher.close)
        for row in rows_of(watcher, seconds):
            said = json.dumps(row) if as_json else line_of(row, config.stale_s)
            out.print(said, highlight=False, markup=False, soft_wrap=True)
            if lines is not None:
                lines.write(json.dumps(row) + "\n")
                lines.flush()


def rows_of(watcher: Watcher, seconds: float | None) -> Iterator[dict[str, Any]]:
    """What each turn says, until the streams end or `seconds` are over."""
    until_s = None if seconds is None else time.monotonic() + seconds
    while watcher.watching and (until_s is None or time.monotonic() < until_s):
        yield from watcher.turn()


def attach(names: Mapping[str, str], config: WatchConfig, archive: Path | None) -> Session:
    """The model with one stream a name."""
    from stream.live.session import Session

    reducer = reducer_of(config.reducer, **config.settings)
    asking = AskConfig(
        model=config.model,
        positions=config.positions,
        capture=config.capture,
        device=config.device,
        max_new_tokens=config.max_new_tokens,
    )
    session = Session(
        load_reasoner(asking, reducer),
        reducer,
        shared_tokens_per_s=config.shared_tokens_per_s,
        floor=config.floor,
    )
    for name in names:
        session.attach(name, config.stream, archive / name if archive else None)
    return session


def open_feeds(names: Mapping[str, str], config: WatchConfig, stack: ExitStack) -> dict[str, Feed]:
    """A feed for each address, in this process or in Ray actors."""
    feeds: dict[str, Feed] = {}
    if config.runner == "ray":
        from stream.actors import local_ray
        from stream.live.cameras import RemoteFeed

        stack.enter_context(local_ray())
        for name, address in names.items():
            feeds[name] = RemoteFeed(address, config.stream.fps, config.source)
        return feeds
    from stream.live.feeds import open_feed

    for name, address in names.items():
        feeds[name] = open_feed(address, config.stream.fps, config.source)
    return feeds


def names_of(sources: list[str]) -> dict[str, str]:
    """Name -> address. NAME=ADDRESS names a source; others are cam0, cam1 ..."""
    names: dict[str, str] = {}
    for i, source in enumerate(sources):
        name, equals, address = source.partition("=")
        if not equals or not name.replace("-", "_").isidentifier():
            name, address = f"cam{i}", source
        if name in names:
            raise ConfigError(f"Two sources are named '{name}'; give each a name of its own.")
        names[name] = address
    return names


def header(names: Mapping[str, str], config: WatchConfig) -> dict[str, Any]:
    """What a record begins with; addresses without their secrets."""
    from stream.sources.base import without_credentials

    return {
        "at_unix_s": time.time(),
        "streams": {name: without_credentials(address) for name, address in names.items()},
        "config": config.model_dump(mode="json"),
    }


def line_of(row: Mapping[str, Any], stale_s: float) -> str:
    """One row for a person."""
    clock = time.strftime("%H:%M:%S", time.localtime(row["at_unix_s"]))
    start = f"{clock} {row['stream']}"
    if row["kind"] == "answer":
        age_s = row["frame_age_s"]
        stale = "  STALE" if age_s > stale_s else ""
        was = f" (was: {row['was']})" if row.get("was") else ""
        return (
            f"{start} @{row['pts_s']:.1f}s  {row['question']} -> {row['answer'] or '(none)'}{was}"
            f"  [{row['confidence']:.2f}; frame {age_s:.2f} s old; "
            f"first token {row['first_token_ms']:.0f} ms]{stale}"
        )
    if row["kind"] == "status":
        return (
            f"{start}  {row['fps']:.1f} fps, {row['encoded_fps']:.1f} encoded; gated "
            f"{row['gated']}, dropped {row['dropped']}, gaps {row['gaps']}; "
            f"{row['tokens_in']} -> {row['tokens_out']} tokens, {row['tokens_per_s']:.0f}/s; "
            f"lag p50 {row['lag_p50_s']:.2f} s, p95 {row['lag_p95_s']:.2f} s"
        )
    age_s = row.get("frame_age_s")
    age = "" if age_s is None else f" (newest frame {age_s:.1f} s old)"
    return f"{start}  {row.get('phase', row['kind'])}: {row['said']}{age}"
