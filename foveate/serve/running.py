"""An answer under way, from its request to its end, as the event loop sees it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio.to_thread
from fastapi import Request

from . import schemas
from .answering import Call, Outcome, understand
from .limits import Refusal
from .service import Service

_POLL_S = 0.1


class Running:
    """texts: what was said so far, None at the end. future: the outcome."""

    def __init__(self, service: Service, work: Callable[[Call], Outcome]) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._metrics = service.metrics
        loop = asyncio.get_running_loop()
        self.texts: asyncio.Queue[str | None] = asyncio.Queue()
        self._call = Call(lambda text: _into(loop, self.texts, text))
        self._job: Future[Outcome] = service.worker.submit(partial(work, self._call))
        self.future = asyncio.wrap_future(self._job)
        self.future.add_done_callback(self._over)

    async def until(self, awaited: asyncio.Future[Any], request: Request) -> None:
        """Wait until it is done; raises Refusal if the client leaves before."""
        while not awaited.done():
            await asyncio.wait([awaited], timeout=_POLL_S)
            if await request.is_disconnected():
                raise Refusal(499, "client_gone", "The client left.")

    async def first(self, request: Request) -> str | None:
        """The first text, None if there is none; raises what the work failed with before it."""
        waiting = asyncio.ensure_future(self.texts.get())
        try:
            await self.until(waiting, request)
        finally:
            waiting.cancel()
        if waiting.result() is None:
            self.future.result()
        return waiting.result()

    def _over(self, future: asyncio.Future[Outcome]) -> None:
        """Its error counts as seen, for perhaps nobody waits for it any more."""
        if not future.cancelled() and future.exception() is None:
            self._metrics.answered(future.result())
        self.texts.put_nowait(None)

    def leave(self) -> None:
        """Nobody waits any more: what has not begun does not, what has ends soon."""
        self._call.stop.set()
        self._job.cancel()


def _into(loop: asyncio.AbstractEventLoop, texts: asyncio.Queue[str | None], text: str) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(texts.put_nowait, text)


async def start(service: Service, body: schemas.ChatRequest) -> Running:
    """Takes a place, gathers what is to be seen, and hands it to the model's thread."""
    asked = understand(body, service.limits, service.retain, service.frames)
    with ExitStack() as stack:
        stack.enter_context(service.places.take())
        if asked.stream is not None:
            service.streams.known(asked.stream)
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="foveate-")))
        media = await anyio.to_thread.run_sync(
            partial(service.answerer.gather, asked, folder), abandon_on_cancel=True
        )
        if asked.stream is not None:
            work = partial(service.answerer.about_stream, asked)
        else:
            work = partial(service.answerer.about_media, asked, media)
        running = Running(service, work)
        held = stack.pop_all()
        running.future.add_done_callback(lambda _: held.close())
    return running
