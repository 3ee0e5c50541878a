"""Fetching a file over HTTP from an address that anyone may reach, and from no other.

The check is made on the resolved address, at the moment of connecting to that same address, so
that neither a redirect nor a name that changes its meaning gets around it.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from stream.sources.base import reason_of, without_credentials

from .limits import Refusal

_REDIRECTS = 5
_MOVED = (301, 302, 303, 307, 308)
_PIECE = 1 << 16
_STEP_S = 10.0


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the open internet; one inside another counts by itself."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if inner:
            return is_public(str(inner))
        if ip in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    return ip.is_global and not ip.is_multicast


_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def fetch(url: str, target: Path, most_bytes: int, limit_s: float, private: bool) -> None:
    """Write what `url` gives to `target`. private: addresses that are not public will do as well.

    Raises Refusal; credentials in the url are not repeated.
    """
    until_s = time.monotonic() + limit_s
    shown = without_credentials(url)
    try:
        for _ in range(_REDIRECTS + 1):
            url_next = _get(url, target, most_bytes, until_s, private)
            if url_next is None:
                return
            url = urljoin(url, url_next)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _refusal(f"{shown} cannot be fetched: {reason_of(error)}.") from None
    raise _refusal(f"{shown} redirects more than {_REDIRECTS} times.")


def _get(url: str, target: Path, most_bytes: int, until_s: float, private: bool) -> str | None:
    """One request; where it leads next, None if `target` is written."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise _refusal("A remote file is given as http://HOST/... or https://HOST/...")
    kind = _Https if parts.scheme == "https" else _Http
    connection = kind(parts.hostname, parts.port, timeout=_step_s(until_s))
    connection.private = private
    late = threading.Timer(until_s - time.monotonic(), connection.cut)
    late.start()
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"Accept": "*/*", "User-Agent": "foveate"})
        reply = connection.getresponse()
        if reply.status in _MOVED and (moved := reply.getheader("Location")):
            return moved
        if reply.status != 200:
            raise _refusal(f"{without_credentials(url)} answers with status {reply.status}.")
        with target.open("wb") as file:
            while piece := reply.read1(_PIECE):
                if file.tell() + len(piece) > most_bytes:
                    raise Refusal(
                        413,
                        "file_too_large",
                        f"{without_credentials(url)} is larger than {most_bytes:,} bytes.",
                    )
                file.write(piece)
        _step_s(until_s)
        if reply.length:
            raise OSError(f"the connection ended {reply.length} bytes early")
        return None
    finally:
        late.cancel()
        connection.close()


class _Http(http.client.HTTPConnection):
    """`cut` ends it from another thread, however slowly the other side sends."""

    private = False
    _wire: socket.socket | None = None

    def connect(self) -> None:
        self.sock = self._wire = self._connected()

    def cut(self) -> None:
        if self._wire is not None:
            with suppress(OSError):
                self._wire.shutdown(socket.SHUT_RDWR)

    def _connected(self) -> socket.socket:
        return _connect(self.host, self.port, self.timeout, self.private)


class _Https(_Http):
    default_port = http.client.HTTPS_PORT

    def _connected(self) -> socket.socket:
        context = ssl.create_default_context()
        return context.wrap_socket(super()._connected(), server_hostname=self.host)


def _connect(host: str, port: int, timeout_s: float | None, private: bool) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    places = [str(place[0]) for *_, place in found]
    for place in places:
        if not (private or is_public(place)):
            raise Refusal(
                403,
                "private_address",
                f"'{host}' is an address of a private network; this server fetches from public "
                "ones alone (--allow-private).",
            )
    return socket.create_connection((places[0], port), timeout_s)


def _step_s(until_s: float) -> float:
    left_s = until_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("it took too long")
    return min(_STEP_S, left_s)


def _refusal(message: str) -> Refusal:
    return Refusal(400, "unreadable_url", message, "messages")
