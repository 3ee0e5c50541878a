"""The loopback hop that live sources connect through."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from stream.sources.live_relay import Relay
from tests.stream.sources.live_servers import mute_server, wait_until


@contextmanager
def echo_server() -> Iterator[tuple[int, list[bytes]]]:
    """The port of a server that sends back what it gets, and what it got so far."""
    got: list[bytes] = []

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer:
                while data := peer.recv(1 << 16):
                    got.append(data)
                    peer.sendall(data)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        yield listener.getsockname()[1], got
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


@contextmanager
def relay_to(target: tuple[str, int] | None) -> Iterator[tuple[Relay, socket.socket]]:
    relay = Relay(target, connect_s=2.0)
    with socket.create_connection(("127.0.0.1", relay.port), timeout=5) as near:
        try:
            yield relay, near
        finally:
            relay.close()


def read(near: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = near.recv(size - len(data))
        assert piece, data
        data += piece
    return data


def test_bytes_pass_both_ways() -> None:
    sent = bytes(range(256)) * 4096
    with echo_server() as (port, _), relay_to(("127.0.0.1", port)) as (relay, near):
        sender = threading.Thread(target=near.sendall, args=(sent,))
        sender.start()
        assert read(near, len(sent)) == sent
        sender.join()
        assert relay.failure == ""


def test_a_tunnel_for_https() -> None:
    with echo_server() as (port, _), relay_to(None) as (_, near):
        near.sendall(f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        reply = b"HTTP/1.1 200 Connected\r\n\r\n"
        assert read(near, len(reply)) == reply
        near.sendall(b"\x16\x03hello")
        assert read(near, 7) == b"\x16\x03hello"


@pytest.mark.parametrize("path", ["/a/b.m3u8?t=1&u=2", "/", ""])
def test_a_request_reaches_its_server_without_the_login(path: str) -> None:
    with echo_server() as (port, _), relay_to(None) as (_, near):
        head = f"GET http://me:pw@127.0.0.1:{port}{path} HTTP/1.1\r\nHost: h\r\nA: b\r\n\r\n"
        near.sendall(head.encode())
        expected = f"GET {path or '/'} HTTP/1.1\r\nHost: h\r\nA: b\r\n\r\n".encode()
        assert read(near, len(expected)) == expected


@pytest.mark.parametrize(
    "head", [b"\r\n\r\n", b"GET /\r\n\r\n", b"CONNECT nowhere HTTP/1.1\r\n\r\n", b"\x00" * 99999]
)
def test_what_is_no_request_is_cut(head: bytes) -> None:
    with relay_to(None) as (_, near):
        try:
            near.sendall(head)
            assert near.recv(1) == b""
        except ConnectionError:
            pass


def test_a_server_that_refuses_is_named() -> None:
    with mute_server() as port:
        pass
    with relay_to(("127.0.0.1", port)) as (relay, near):
        assert near.recv(1) == b""
        wait_until(lambda: relay.failure)
        assert relay.failure == f"no connection to 127.0.0.1:{port} (Connection refused)"


def test_a_server_without_an_address_is_named() -> None:
    with relay_to(("camera.invalid", 554)) as (relay, near):
        assert near.recv(1) == b""
        assert relay.failure.startswith("no connection to camera.invalid:554 (")


def test_closing_cuts_everything_at_once() -> None:
    with mute_server() as port, relay_to(("127.0.0.1", port)) as (relay, near):
        near.sendall(b"DESCRIBE")
        time.sleep(0.1)
        began_s = time.monotonic()
        relay.close()
        assert time.monotonic() - began_s < 0.5
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", relay.port), timeout=1)
        assert near.recv(1) == b""
        relay.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "live relay"]
