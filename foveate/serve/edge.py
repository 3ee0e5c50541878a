"""What every request passes before a route sees it: host, key, body size, time."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .limits import Limits, Refusal

MOST_CONNECTIONS = 256

OPEN = "/health"
"""The one path that needs no key."""

_LOG = logging.getLogger("foveate.serve")
_LOOPBACK = {b"127.0.0.1", b"localhost", b"[::1]"}


class Edge:
    """ASGI middleware.

    The body is read whole, up to its limit, before the app runs. api_key: None lets everyone on
    this machine in, so that the Host header must name this machine: a web page that a browser here
    shows may not reach the server under a name of its own.
    told: path and status of each request.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        api_key: str | None,
        loopback: bool,
        told: Callable[[str, int], None],
    ) -> None:
        self._app, self._limits, self._told = app, limits, told
        self._key = None if api_key is None else api_key.encode()
        self._loopback = loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status: int | None = None

        async def telling(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        refusal: Refusal | None = None
        late = Refusal(
            408,
            "request_too_slow",
            f"The request did not arrive within {self._limits.request_s:g} s.",
        )
        try:
            async with asyncio.timeout(self._limits.request_s):
                self._admit(scope)
                body = await self._body(scope, receive)
                if body is None:
                    return
                late = Refusal(
                    504,
                    "timeout",
                    f"The request was not done within {self._limits.request_s:g} s; ask for fewer "
                    "frames or tokens, or try again when the server is less busy.",
                )
                await self._app(scope, _replay(body, receive), telling)
        except TimeoutError:
            refusal = late
        except Refusal as refused:
            refusal = refused
        except Exception:
            _LOG.exception("a request failed")
            refusal = Refusal(500, "internal_error", "The server failed; its log says why.")
        if refusal is not None and status is None:
            await _refuse(refusal, telling)
        self._told(scope["path"], status or 0)

    def _admit(self, scope: Scope) -> None:
        head = dict(scope["headers"])
        if self._key is None and self._loopback:
            host = head.get(b"host", b"").lower()
            if host.rpartition(b":")[0] not in _LOOPBACK and host not in _LOOPBACK:
                raise Refusal(
                    403,
                    "host_not_allowed",
                    "Without an API key this server answers to 127.0.0.1 and localhost alone.",
                )
        if self._key is not None and scope["path"] != OPEN:
            kind, _, given = head.get(b"authorization", b"").partition(b" ")
            if not hmac.compare_digest(given.strip(), self._key) or kind.lower() != b"bearer":
                raise Refusal(
                    401,
                    "invalid_api_key",
                    "An API key is needed: Authorization: Bearer KEY.",
                )

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client left."""
        most = self._limits.body_bytes
        too_large = Refusal(
            413, "body_too_large", f"The body is larger than {most:,} bytes, which is all allowed."
        )
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > most:
            raise too_large
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > most:
                raise too_large
            if not message.get("more_body", False):
                return bytes(body)


class Connection(H11Protocol):
    """uvicorn's, which waits for ever for the head of a request, on any number of connections; here
    its keep-alive time, from the connection or the reply before, is how long a head may take, and
    connections beyond `MOST_CONNECTIONS` are closed."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.close()
            return
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def data_received(self, data: bytes) -> None:
        self.conn.receive_data(data)
        self.handle_events()


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body in one message, then whatever the connection says."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


async def _refuse(refusal: Refusal, send: Send) -> None:
    body = json.dumps(refusal.body()).encode()
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": refusal.status, "headers": head})
    await send({"type": "http.response.body", "body": body})
