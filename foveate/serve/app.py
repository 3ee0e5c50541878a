"""The routes. All that waits does so here; all that computes does so in the model's thread."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio.to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from stream.errors import FoveateError, UnknownNameError

from . import schemas
from .answering import Call, Outcome, understand
from .edge import Edge
from .limits import Refusal
from .service import Service

_POLL_S = 0.1
_STATUSES = (400, 401, 403, 404, 405, 408, 409, 413, 429, 500, 504)


def make_app(service: Service) -> FastAPI:
    """The ASGI application; it closes `service` when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(service.close)

    app = FastAPI(
        title="foveate",
        version=service.version,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses={s: {"model": schemas.ErrorBody} for s in (*_STATUSES, 422)},
    )
    for kind in (Refusal, FoveateError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _say_error)
    _add_answers(app, service)
    _add_streams(app, service)
    _add_rest(app, service)
    known = {str(getattr(route, "path", "")) for route in app.routes}

    def told(path: str, status: int) -> None:
        service.metrics.requested(path if path in known else "other", status)

    app.add_middleware(
        Edge,
        limits=service.limits,
        api_key=service.api_key,
        loopback=service.loopback,
        told=told,
    )
    return app


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=schemas.ChatReply)
    async def chat(body: schemas.ChatRequest, request: Request) -> Any:
        """Answer about pictures, a video or an attached stream."""
        if body.model != service.model:
            raise _no_model(body.model)
        running = await _start(service, body)
        if body.stream:
            return await _streamed(service, body, request, running)
        try:
            outcome = await running.finished(request)
        finally:
            running.leave()
        return _reply(service, body, running.id, outcome)

    def _no_model(given: str) -> Refusal:
        message = f"There is no model '{given[:200]}' here; there is '{service.model}'."
        return Refusal(404, "model_not_found", message, "model")

    @app.get("/v1/models")
    async def models() -> schemas.ModelList:
        return schemas.ModelList(data=[_model()])

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> schemas.ModelCard:
        if name != service.model:
            raise _no_model(name)
        return _model()

    def _model() -> schemas.ModelCard:
        return schemas.ModelCard(id=service.model, created=service.began_unix_s)


def _add_streams(app: FastAPI, service: Service) -> None:
    @app.post("/v1/streams")
    async def attach(body: schemas.StreamRequest) -> schemas.StreamCard:
        """Attach a camera; it connects in the background."""
        given = body.model_dump(exclude={"name", "source"}, exclude_none=True)
        await asyncio.wrap_future(service.attach(body.name, body.source, given))
        return _card(body.name)

    @app.get("/v1/streams")
    async def streams() -> schemas.StreamList:
        rows = service.streams.rows()
        return schemas.StreamList(data=[schemas.StreamCard(**row) for row in rows])

    @app.get("/v1/streams/{name}")
    async def stream(name: str) -> schemas.StreamCard:
        return _card(name)

    @app.delete("/v1/streams/{name}")
    async def detach(name: str) -> schemas.Gone:
        await asyncio.wrap_future(service.worker.submit(partial(service.streams.detach, name)))
        return schemas.Gone(name=name)

    def _card(name: str) -> schemas.StreamCard:
        service.streams.known(name)
        return next(schemas.StreamCard(**r) for r in service.streams.rows() if r["name"] == name)


def _add_rest(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> schemas.Health:
        return schemas.Health(
            model=service.model, streams=len(service.streams), requests=service.places.taken
        )

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """In Prometheus' text form."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


class _Running:
    """An answer under way, as the event loop sees it: texts so far, and the outcome."""

    def __init__(self, service: Service, work: Callable[[Call], Outcome]) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())
        loop = asyncio.get_running_loop()
        self.texts: asyncio.Queue[str | None] = asyncio.Queue()
        self._call = Call(lambda text: _into(loop, self.texts, text))
        self._job: Future[Outcome] = service.worker.submit(partial(work, self._call))
        self.future = asyncio.wrap_future(self._job)
        self.future.add_done_callback(lambda _: self.texts.put_nowait(None))

    async def finished(self, request: Request) -> Outcome:
        """Raises Refusal if the client leaves before."""
        while not self.future.done():
            await asyncio.wait([self.future], timeout=_POLL_S)
            if await request.is_disconnected():
                raise Refusal(499, "client_gone", "The client left.")
        return self.future.result()

    async def first(self, request: Request) -> str | None:
        """The first text, or None once all is over."""
        waiting = asyncio.ensure_future(self.texts.get())
        try:
            while not waiting.done():
                await asyncio.wait([waiting], timeout=_POLL_S)
                if await request.is_disconnected():
                    raise Refusal(499, "client_gone", "The client left.")
            return waiting.result()
        finally:
            waiting.cancel()

    def leave(self) -> None:
        """Nobody waits any more: what has not begun does not, what has ends soon."""
        self._call.stop.set()
        self._job.cancel()


def _into(loop: asyncio.AbstractEventLoop, texts: asyncio.Queue[str | None], text: str) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(texts.put_nowait, text)


async def _start(service: Service, body: schemas.ChatRequest) -> _Running:
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
        running = _Running(service, work)
        held = stack.pop_all()
        running.future.add_done_callback(lambda _: held.close())
    return running


async def _streamed(
    service: Service, body: schemas.ChatRequest, request: Request, running: _Running
) -> StreamingResponse:
    """Server-sent events; what fails before the first one has a status of its own."""
    try:
        first = await running.first(request)
        if first is None:
            running.future.result()
    except BaseException:
        running.leave()
        raise
    return StreamingResponse(_events(service, body, running, first), media_type="text/event-stream")


async def _events(
    service: Service, body: schemas.ChatRequest, running: _Running, first: str | None
) -> AsyncIterator[str]:
    head = {
        "id": running.id,
        "object": "chat.completion.chunk",
        "created": running.created,
        "model": service.model,
    }

    def chunk(delta: dict[str, str], finish: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return _event({**head, "choices": [choice], **more})

    try:
        yield chunk({"role": "assistant", "content": ""})
        sent, text = "", first
        while text is not None:
            if text.startswith(sent) and len(text) > len(sent) and not text.endswith("\ufffd"):
                yield chunk({"content": text[len(sent) :]})
                sent = text
            text = await running.texts.get()
        try:
            outcome = running.future.result()
        except FoveateError as error:
            yield _event(_refusal_of(error).body())
            return
        if rest := outcome.answer.text.removeprefix(sent):
            yield chunk({"content": rest})
        service.metrics.answered(outcome)
        yield chunk({}, outcome.finish, foveate=_evidence(outcome, body).model_dump())
        if body.stream_options and body.stream_options.include_usage:
            yield _event({**head, "choices": [], "usage": _usage(outcome).model_dump()})
        yield "data: [DONE]\n\n"
    finally:
        running.leave()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _reply(
    service: Service, body: schemas.ChatRequest, name: str, outcome: Outcome
) -> schemas.ChatReply:
    service.metrics.answered(outcome)
    said = schemas.Said(content=outcome.answer.text)
    return schemas.ChatReply(
        id=name,
        created=int(time.time()),
        model=service.model,
        choices=[schemas.Choice(message=said, finish_reason=outcome.finish)],
        usage=_usage(outcome),
        foveate=_evidence(outcome, body),
    )


def _usage(outcome: Outcome) -> schemas.Usage:
    read = outcome.text_tokens + outcome.tokens_out
    return schemas.Usage(
        prompt_tokens=read,
        completion_tokens=outcome.new_tokens,
        total_tokens=read + outcome.new_tokens,
        prompt_tokens_details=schemas.VisualTokens(
            visual_tokens_in=outcome.tokens_in, visual_tokens_out=outcome.tokens_out
        ),
    )


def _evidence(outcome: Outcome, body: schemas.ChatRequest) -> schemas.Evidence:
    return schemas.Evidence(
        tokens_in=outcome.tokens_in,
        tokens_out=outcome.tokens_out,
        retain=outcome.tokens_out / outcome.tokens_in,
        evidence_s=list(outcome.evidence_s),
        frame_age_s=outcome.frame_age_s,
        recalled=outcome.recalled,
        confidence=outcome.answer.confidence,
        timings_ms=outcome.timings_ms,
        notes=outcome.notes,
        ignored=body.ignored,
    )


async def _say_error(request: Request, error: Exception) -> JSONResponse:
    refusal = _refusal_of(error)
    headers = getattr(error, "headers", None)
    return JSONResponse(refusal.body(), refusal.status, headers)


def _refusal_of(error: Exception) -> Refusal:
    match error:
        case Refusal():
            return error
        case RequestValidationError():
            return _invalid(error.errors())
        case HTTPException():
            code = {404: "not_found", 405: "method_not_allowed"}.get(
                error.status_code, "invalid_request"
            )
            return Refusal(error.status_code, code, str(error.detail))
        case UnknownNameError():
            return Refusal(404, "not_found", str(error))
        case _:
            return Refusal(400, "invalid_request", str(error))


def _invalid(details: Sequence[Any]) -> Refusal:
    """Where the first few mistakes are, without repeating what was given."""
    wheres = [".".join(str(p)[:64] for p in d["loc"] if p != "body")[:200] for d in details]
    said = [f"{w or 'the body'}: {d['msg']}"[:300] for w, d in zip(wheres, details, strict=True)]
    return Refusal(400, "invalid_request", "; ".join(said[:5]), wheres[0] or None)
