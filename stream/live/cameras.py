"""Sources in Ray actors of their own: a camera's decoding takes no time from the model's process,
and a source that dies is started again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ray

from stream.errors import FoveateError, SourceError
from stream.sources.live_values import End, Gap, LiveFrame, LiveSettings, Silence

from .feeds import Feed, check_address, open_feed

_ANSWER_S = 0.25


class CameraActor:
    """Owns one feed."""

    def __init__(self, address: str, fps: float | None, settings: LiveSettings) -> None:
        self._feed: Feed = open_feed(address, fps, settings)

    def take(self, timeout_s: float) -> list[LiveFrame] | Silence | End:
        return self._feed.take(timeout_s)

    def said(self) -> dict[str, Any]:
        return self._feed.said()


class RemoteFeed:
    """A `CameraActor` as a feed. One request is under way at any time, so at most one batch of
    frames is in flight."""

    def __init__(self, address: str, fps: float | None, settings: LiveSettings) -> None:
        check_address(address)
        actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(CameraActor)
        self._actor: Any = actor.remote(address, fps, settings)
        self._request: Any = None
        self._last: LiveFrame | None = None
        self._shift_s = 0.0

    def take(self, timeout_s: float) -> list[LiveFrame] | Silence | End:
        if self._request is None:
            self._request = self._actor.take.remote(_ANSWER_S)
        done, _ = ray.wait([self._request], timeout=timeout_s)
        if not done:
            return Silence(timeout_s, "connecting" if self._last is None else "live", None, "")
        request, self._request = self._request, None
        try:
            got = ray.get(request)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, FoveateError):
                raise error.cause from None
            raise
        except ray.exceptions.RayActorError as error:
            raise SourceError(f"A source's process cannot start: {error}") from None
        self._request = self._actor.take.remote(_ANSWER_S)
        return [self._placed(frame) for frame in got] if isinstance(got, list) else got

    def _placed(self, got: LiveFrame) -> LiveFrame:
        """The frame in memory of its own and in ascending media time, though the actor may have
        begun anew."""
        frame = replace(got.frame, image=got.frame.image.copy())
        last, got = self._last, replace(got, frame=frame)
        if last is not None and frame.pts_s + self._shift_s <= last.frame.pts_s:
            missing_s = max(1e-3, got.arrival_s - last.arrival_s)
            self._shift_s = last.frame.pts_s + missing_s - frame.pts_s
            got = replace(got, gap=Gap(("reconnect",), missing_s))
        if self._shift_s:
            got = replace(got, frame=replace(frame, pts_s=frame.pts_s + self._shift_s))
        self._last = got
        return got

    def said(self) -> dict[str, Any]:
        said: dict[str, Any] = ray.get(self._actor.said.remote())
        return said

    def kill(self) -> None:
        """End its process, which Ray then starts again; for trials."""
        ray.kill(self._actor, no_restart=False)

    def close(self) -> None:
        """Once the request under way is answered, or did not come in time."""
        if self._request is not None:
            ray.wait([self._request], timeout=2 * _ANSWER_S)
        ray.kill(self._actor)
