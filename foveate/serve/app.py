"""The routes. All that waits does so here; all that computes does so in the model's thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio.to_thread
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST

from . import schemas
from .edge import Edge
from .errors import KINDS, say_error
from .limits import Refusal
from .replies import events, reply_of
from .running import start
from .service import Service

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
    for kind in KINDS:
        app.add_exception_handler(kind, say_error)
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
        running = await start(service, body)
        try:
            if not body.stream:
                await running.until(running.future, request)
                return reply_of(body, running, running.future.result())
            first = await running.first(request)
        except BaseException:
            running.leave()
            raise
        return StreamingResponse(events(body, running, first), media_type="text/event-stream")

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
