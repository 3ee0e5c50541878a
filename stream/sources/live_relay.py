"""A hop over loopback that every network connection of a live source passes.

FFmpeg cannot be told to let go of a server that hangs; a connection that this process owns can be
cut at any moment. It is also where a failed look-up or connection is told apart from bad data.

RTSP is passed on byte by byte to its one server. For HTTP the relay is a forward proxy, since a
playlist may name other servers.
"""

from __future__ import annotations

import re
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit

from .base import reason_of

_PIECE = 1 << 16
_POLL_S = 0.2
_JOIN_S = 1.0
_HEAD = re.compile(rb"([A-Z]+) (\S+) (HTTP/1\.[01])\r\n((?:.*\r\n)*?)\r\n")


class Relay:
    """Listens on 127.0.0.1:`port` until closed.

    target: (host, port) that all connections lead to; None makes it an HTTP proxy.
    connect_s: how long looking up and connecting may take.
    """

    def __init__(self, target: tuple[str, int] | None, connect_s: float) -> None:
        self._target, self._connect_s = target, connect_s
        self.failure = ""
        """Why the latest connection could not be made; empty if it could."""
        self._lock = threading.Lock()
        self._closed = False
        self._sockets: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(_POLL_S)
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)

    def close(self) -> None:
        """Cut every connection. May be called from any thread, and twice."""
        with self._lock:
            self._closed = True
            threads = list(self._threads)
            for each in (self._listener, *self._sockets):
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        end_s = time.monotonic() + _JOIN_S
        for thread in threads:
            thread.join(max(0.0, end_s - time.monotonic()))

    def _start[*A](self, work: Callable[[*A], None], *args: *A) -> None:
        """Run `work` in a thread that `close` waits for."""

        def run() -> None:
            try:
                work(*args)
            finally:
                with self._lock:
                    self._threads.discard(thread)

        thread = threading.Thread(target=run, name="live relay", daemon=True)
        with self._lock:
            self._threads.add(thread)
            thread.start()

    def _own(self, each: socket.socket) -> bool:
        """Have `each` cut by `close`; False if it was called already."""
        with self._lock:
            if not self._closed:
                self._sockets.add(each)
            return not self._closed

    def _let_go(self, each: socket.socket) -> None:
        with self._lock:
            self._sockets.discard(each)
        each.close()

    def _accept(self) -> None:
        with self._listener:
            while not self._closed:
                try:
                    near, _ = self._listener.accept()
                except TimeoutError:
                    continue
                except OSError:
                    return
                self._start(self._pass_on, near)

    def _pass_on(self, near: socket.socket) -> None:
        far = None
        try:
            if self._own(near):
                near.settimeout(None)
                far = self._reach(near)
                self._pump(near, far)
        except (OSError, ValueError):
            pass
        finally:
            self._let_go(near)
            if far is not None:
                self._let_go(far)

    def _reach(self, near: socket.socket) -> socket.socket:
        if self._target is not None:
            return self._connect(*self._target)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            piece = near.recv(1)
            if not piece or len(head) > _PIECE:
                raise ValueError("not a request")
            head += piece
        request = _HEAD.fullmatch(head)
        if request is None:
            raise ValueError("not a request")
        method, place, version, fields = request.groups()
        if method == b"CONNECT":
            host, _, port = place.decode("ascii").rpartition(":")
            far = self._connect(host.strip("[]"), int(port))
            near.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
            return far
        parts = urlsplit(place.decode("latin-1"))
        far = self._connect(parts.hostname or "", parts.port or 80)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        far.sendall(b"%s %s %s\r\n%s\r\n" % (method, path.encode("latin-1"), version, fields))
        return far

    def _connect(self, host: str, port: int) -> socket.socket:
        end_s = time.monotonic() + self._connect_s
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            for number, (family, kind, protocol, _, place) in enumerate(found, 1):
                far = socket.socket(family, kind, protocol)
                try:
                    if not self._own(far):
                        raise OSError("closed")
                    far.settimeout(max(0.1, end_s - time.monotonic()))
                    far.connect(place)
                    far.settimeout(None)
                    self.failure = ""
                    return far
                except OSError:
                    self._let_go(far)
                    if number == len(found):
                        raise
            raise OSError("no address")
        except OSError as error:
            self.failure = f"no connection to {host}:{port} ({reason_of(error)})"
            raise

    def _pump(self, near: socket.socket, far: socket.socket) -> None:
        with selectors.DefaultSelector() as ready:
            ready.register(near, selectors.EVENT_READ, (near, far))
            ready.register(far, selectors.EVENT_READ, (far, near))
            while not self._closed:
                for key, _ in ready.select():
                    source, sink = key.data
                    data = source.recv(_PIECE)
                    if not data:
                        return
                    sink.sendall(data)
