"""`foveate serve` against requests that mean no good, made by hand."""

from __future__ import annotations

import gzip
import json
import os
import resource
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest

from foveate.serve import edge, remote
from foveate.serve.service import Access
from policies.reasoner import VideoReasoner
from stream.reducers.base import Reducer
from tests.stream.sources.making import write_video

from .serving import MODEL, Served, chat, data_url, png, seen, served

PIXELS = 160 * 96
KEY = "correct horse battery staple"
VIDEO = data_url(b"\0" * 64)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An allowed folder `in/` with a clip, what leads out of it, and a secret beside it."""
    top = tmp_path_factory.mktemp("serve")
    inside = top / "in"
    inside.mkdir()
    write_video(inside / "clip.mp4", 6)
    write_video(top / "secret.mp4", 6)
    (inside / "link.mp4").symlink_to(top / "secret.mp4")
    (inside / "folder.mp4").mkdir()
    os.mkfifo(inside / "pipe.mp4")
    (inside / "list.m3u8").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{top / 'secret.mp4'}\n#EXT-X-ENDLIST\n"
    )
    (inside / "list.ffconcat").write_text(f"ffconcat version 1.0\nfile {top / 'secret.mp4'}\n")
    return inside


@pytest.fixture(scope="module")
def server(serving: tuple[VideoReasoner, Reducer], root: Path) -> Iterator[Served]:
    limits = {"pixels": PIXELS, "duration_s": 2.0, "body_mib": 0.5, "frames": 8, "request_s": 20.0}
    access = Access(KEY, loopback=False, roots=(root,), remote=True)
    with served(*serving, access, streams=1, text_chars=2000, **limits) as running:
        yield running


def bomb_png(width: int, height: int) -> bytes:
    """A few bytes that declare a large picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(b"\0" * 10_000_000, 9))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rows + chunk(b"IEND", b"")


def test_files_are_read_under_the_roots_alone(server: Served, root: Path) -> None:
    with server.client() as client:
        reply = client.chat.completions.create(**chat(seen(f"file://{root}/clip.mp4")))
        assert reply.foveate["tokens_in"] == 2 * 196
    secret = root.parent / "secret.mp4"
    for url in (
        f"file://{secret}",
        f"file://{root}/../secret.mp4",
        f"file://{root}/%2e%2e/secret.mp4",
        f"file://{root}/..%2fsecret.mp4",
        f"file://{root}/link.mp4",
        f"file://{root}/nowhere.mp4",
        f"file://{root}/folder.mp4",
        f"file://{root}/pipe.mp4",
        f"file://{root}/clip.mp4%00.png",
        f"file://elsewhere{root}/clip.mp4",
        "file:///etc/passwd",
        "file:///dev/zero",
        "file:///proc/self/environ",
        f"file:{'/x' * 5000}",
    ):
        for kind in ("video", "image"):
            assert server.refused(seen(url, kind=kind)) == (403, "file_not_allowed"), url
    for url in (f"{root}/clip.mp4", "ftp://x/y", "lavfi:testsrc2", "concat:a|b", "gopher://x", "-"):
        assert server.refused(seen(url)) == (400, "unsupported_url"), url


def test_playlists_open_nothing(server: Served, root: Path) -> None:
    for name in ("list.m3u8", "list.ffconcat"):
        data = (root / name).read_bytes()
        for url in (f"file://{root}/{name}", data_url(data)):
            assert server.refused(seen(url)) == (400, "invalid_video")
    sdp = b"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n"
    assert server.refused(seen(data_url(sdp))) == (400, "invalid_video")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
    assert server.refused(seen(data_url(script), kind="image")) == (400, "invalid_image")


def test_bombs_are_refused_by_what_they_declare(server: Served, tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for side in (200, 60_000, 2**31 - 1):
        got = server.refused(seen(data_url(bomb_png(side, side)), kind="image"))
        assert got in ((413, "picture_too_large"), (400, "invalid_image"))
    large = write_video(tmp_path / "large.mp4", 1, (1280, 720)).read_bytes()
    assert server.refused(seen(data_url(large))) == (413, "picture_too_large")
    long = write_video(tmp_path / "long.mp4", 60, (64, 48), fps=24).read_bytes()
    assert server.refused(seen(data_url(long))) == (413, "video_too_long")
    fast = write_video(tmp_path / "fast.mkv", 600, (16, 16), pts=range(600)).read_bytes()
    assert server.refused(seen(data_url(fast))) == (413, "video_too_long")
    grows = b"".join(
        write_video(
            tmp_path / f"{w}.ts", 4, (w, 48), pts=[w + 40 * i for i in range(4)]
        ).read_bytes()
        for w in (64, 1280)
    )
    assert server.refused(seen(data_url(grows))) == (413, "picture_too_large")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 300_000


def test_broken_media_are_named_without_paths(server: Served, root: Path) -> None:
    clip = (root / "clip.mp4").read_bytes()
    with server.http() as http:
        for url in (data_url(clip[: len(clip) // 2]), data_url(os.urandom(500)), data_url(png())):
            error = http.post("/v1/chat/completions", json=chat(seen(url))).json()["error"]
            assert error["code"] in ("invalid_video", "unreadable_media")
            assert "/tmp" not in error["message"]
    cut = data_url(png(100, 90)[:-40], "image/png")
    assert server.refused(seen(cut, kind="image"))[1] in ("invalid_image", "unreadable_media")
    for url in (
        "data:video/mp4,abc",
        "data:;base64,",
        "data:;base64,%%%",
        "data:;base64,YQ",
        "data:",
    ):
        assert server.refused(seen(url)) == (400, "invalid_data_url"), url


PUBLIC = "93.184.216.34 2606:4700::1111"
PRIVATE = (
    "127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 "
    "255.255.255.255 ::1 :: fe80::1 fc00::1 ff02::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 2002:7f00:1:: "
    "64:ff9b::7f00:1 64:ff9b::a9fe:a9fe"
)


def test_which_addresses_are_public() -> None:
    assert [a for a in f"{PUBLIC} {PRIVATE}".split() if remote.is_public(a)] == PUBLIC.split()


class _Web(BaseHTTPRequestHandler):
    """/go?URL redirects, /loop for ever; /clip is a video, /large does not end."""

    clip = b""

    def do_GET(self) -> None:
        if self.path.startswith("/go?"):
            self.send_response(302)
            self.send_header("Location", self.path.partition("?")[2])
            self.end_headers()
        elif self.path == "/loop":
            self.send_response(302)
            self.send_header("Location", "/loop")
            self.end_headers()
        elif self.path == "/clip":
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.clip)))
            self.end_headers()
            self.wfile.write(self.clip)
        elif self.path == "/large":
            self.send_response(200)
            self.end_headers()
            with_end = b"\0" * (1 << 16)
            for _ in range(1000):
                try:
                    self.wfile.write(with_end)
                except OSError:
                    return
        else:
            self.send_error(404)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def web(clip: bytes) -> Iterator[int]:
    handler = type("Web", (_Web,), {"clip": clip})
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    try:
        yield httpd.server_port
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def test_private_addresses_are_refused_after_look_up_and_on_redirects(
    server: Served, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with web((root / "clip.mp4").read_bytes()) as port:
        for host in ("127.0.0.1", "localhost", "2130706433", "127.1", "[::ffff:127.0.0.1]"):
            status, code = server.refused(seen(f"http://{host}:{port}/clip"))
            assert (status, code) in ((403, "private_address"), (400, "unreadable_url")), host
        assert server.refused(seen(f"http://127.0.0.1:{port}/clip")) == (403, "private_address")

        monkeypatch.setattr(remote, "is_public", lambda ip: ip == "127.0.0.1")
        with server.client() as client:
            moved = f"http://127.0.0.1:{port}/go?http://127.0.0.1:{port}/clip"
            reply = client.chat.completions.create(**chat(seen(moved)))
            assert reply.foveate["tokens_in"] == 2 * 196
        for url, refusal in {
            f"http://127.0.0.1:{port}/go?http://127.0.0.2:{port}/clip": (403, "private_address"),
            f"http://127.0.0.1:{port}/go?file:///etc/passwd": (400, "unreadable_url"),
            f"http://127.0.0.1:{port}/loop": (400, "unreadable_url"),
            f"http://127.0.0.1:{port}/nothing": (400, "unreadable_url"),
            f"http://127.0.0.1:{port}/large": (413, "file_too_large"),
            "http://127.0.0.1:1/x": (400, "unreadable_url"),
            "http://127.0.0.1:99999/x": (400, "unreadable_url"),
            "http://": (400, "unreadable_url"),
            "http://a b\r\nX: y/": (400, "unreadable_url"),
        }.items():
            assert server.refused(seen(url)) == refusal, url


@pytest.fixture(scope="module")
def hasty(serving: tuple[VideoReasoner, Reducer]) -> Iterator[Served]:
    """All that is not said is not allowed; and a request has half a second."""
    with served(*serving, request_s=0.5) as running:
        yield running


def test_nothing_is_allowed_by_default(hasty: Served, root: Path) -> None:
    assert hasty.refused(seen("https://example.com/a.mp4")) == (403, "remote_not_allowed")
    assert hasty.refused(seen(f"file://{root}/clip.mp4")) == (403, "file_not_allowed")
    with hasty.http() as http:
        evil = http.get("/health", headers={"Host": "evil.example"})
        assert (evil.status_code, evil.json()["error"]["code"]) == (403, "host_not_allowed")


def test_slow_work_and_slow_clients_end_in_time(hasty: Served) -> None:
    held, entered = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        held.wait(30)

    hasty.service.worker.submit(hold)
    assert entered.wait(30)
    late = hasty.refused(seen(data_url(png(), "image/png"), kind="image"))
    held.set()
    assert late == (504, "timeout")
    head = b"POST /v1/streams HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9"
    assert send(hasty.port, head) == b""
    assert send(hasty.port, head + b"\r\n\r\n{").split()[1] == b"408"
    with hasty.http() as http:
        assert http.get("/health").json()["requests"] == 0


def test_connections_have_a_number(hasty: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "MOST_CONNECTIONS", 0)
    assert send(hasty.port, b"") == b""
    monkeypatch.undo()
    with hasty.http() as http:
        assert http.get("/health").status_code == 200


def send(port: int, data: bytes) -> bytes:
    """All that comes back until the server ends the connection, which it must."""
    got = b""
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        connection.sendall(data)
        while piece := connection.recv(1 << 16):
            got += piece
    return got


def test_bodies_have_a_size(server: Served) -> None:
    large = "x" * (1 << 20)
    assert server.refused(large) == (413, "body_too_large")
    with server.http() as http:
        pieces = (b" " * (1 << 16) for _ in range(20))
        assert http.post("/v1/streams", content=pieces).status_code == 413
        packed = gzip.compress(b"0" * (1 << 20))
        head = {"content-encoding": "gzip", "content-type": "application/json"}
        assert http.post("/v1/streams", content=packed, headers=head).status_code == 400
    head = f"Host: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {10**30}\r\n\r\n".encode()
    reply = send(server.port, b"POST /v1/streams HTTP/1.1\r\nConnection: close\r\n" + head)
    assert reply.split()[1:2] in ([b"413"], [b"400"])


def test_a_key_opens_all_but_health(server: Served) -> None:
    with server.http() as http:
        for wrong in (
            "",
            "Bearer",
            "Bearer x",
            f"Basic {KEY}",
            f"Bearer {KEY}x",
            f"Bearer {KEY[:-1]}",
        ):
            for path in ("/v1/models", "/v1/streams", "/metrics", "/openapi.json", "/nowhere"):
                reply = http.get(path, headers={"authorization": wrong})
                assert (reply.status_code, reply.json()["error"]["code"]) == (
                    401,
                    "invalid_api_key",
                )
            assert http.get("/health", headers={"authorization": wrong}).status_code == 200
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong") as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_requests_that_ask_too_much_or_nonsense(server: Served, root: Path) -> None:
    clip = f"file://{root}/clip.mp4"
    picture = seen(data_url(png(), "image/png"), kind="image")[0]
    text = {"type": "text", "text": "what?"}
    for content, code in (
        ("no picture at all", "nothing_to_see"),
        ([picture], "no_question"),
        ([*[picture] * 9, text], "too_many_frames"),
        ([picture, *seen(clip)], "too_many_media"),
        ([*seen(clip), *seen("stream:door")], "too_many_media"),
        (seen(clip, "x" * 2001), "text_too_long"),
        (seen(clip, "see <video> and <|im_end|>"), "control_tokens"),
    ):
        assert server.refused(content)[1] == code
    for fields, code in (
        ({"foveate": {"frames": 9}}, "too_many_frames"),
        ({"foveate": {"span_s": [0, 1]}}, "not_a_stream"),
        ({"foveate": {"retain": 0}}, "invalid_request"),
        ({"foveate": {"span_s": [0]}}, "invalid_request"),
        ({"foveate": {"retian": 1}}, "invalid_request"),
        ({"n": 2}, "invalid_request"),
        ({"stop": ["x"]}, "invalid_request"),
        ({"logprobs": True}, "invalid_request"),
        ({"max_tokens": "1"}, "invalid_request"),
    ):
        assert server.refused(seen(clip), **fields)[1] == code, fields
    with server.http() as http:
        for body in (
            b'{"model": "tiny-video", "messages": [{"role": "user", "content": NaN}], "n": NaN}',
            b'{"max_tokens": ' + b"9" * 5000 + b"}",
            b"[" * 100_000,
            b'"\\ud800"',
            dumps(chat(seen(clip), model="\ud800")),
            dumps(chat(seen(clip), foveate={"\ud800": 1})),
            b"\xff\xfe",
            b"",
            b"null",
        ):
            reply = http.post(
                "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
            )
            assert reply.status_code == 400, body[:80]
            assert reply.json()["error"]["type"] == "invalid_request_error"
        odd = chat(seen(clip), max_tokens=10**400, temperature=9e999)
        reply = http.post("/v1/chat/completions", content=dumps(odd), headers=JSON)
        assert reply.status_code == 200, reply.text
        assert reply.json()["foveate"]["ignored"] == ["temperature"]
        plain_text = http.post("/v1/streams", content=dumps({"name": "x"}))
        assert plain_text.status_code == 400


JSON = {"content-type": "application/json"}


def dumps(data: Any) -> bytes:
    return json.dumps(data).encode()


def test_clients_attach_harmless_cameras_alone(server: Served) -> None:
    with server.http() as http:

        def attach(source: str, name: str = "door", **more: Any) -> tuple[int, str]:
            reply = http.post("/v1/streams", json={"name": name, "source": source, **more})
            return reply.status_code, reply.json().get("error", {}).get("code", "")

        for source in (
            "lavfi:movie=/etc/passwd",
            "lavfi:testsrc2,movie=/etc/passwd[x]",
            "lavfi:testsrc2=size=64x48,metadata=print:file=/tmp/x",
            "lavfi:testsrc2=size=9999x9999",
            "lavfi:testsrc2=size=0x48",
            "lavfi:testsrc2=size=64x48:size=9999x9999",
            "lavfi:color=color=red:",
            "lavfi:testsrc2\n",
            "lavfi:",
            "camera:0",
            "/dev/video0",
            "-",
            "/etc/passwd",
            "file:///etc/passwd",
            "rtsp://10.0.0.1/x",
            "http://169.254.169.254/latest",
            "udp://0.0.0.0:1",
            "x" * 4000,
        ):
            assert attach(source) == (403, "source_not_allowed"), source
        assert attach("lavfi:testsrc2", "a/b") == (400, "invalid_request")
        assert attach("lavfi:testsrc2", window_frames=9) == (400, "too_many_frames")
        assert attach("lavfi:testsrc2=size=64x48", window_frames=2) == (200, "")
        assert attach("lavfi:testsrc2=size=64x48", "b") == (429, "too_many_streams")
        assert http.delete("/v1/streams/door").status_code == 200


def test_a_camera_with_large_pictures_is_let_go(server: Served) -> None:
    server.service.attach("big", "lavfi:testsrc2=size=320x240", {}, trusted=True).result()
    with server.http() as http:
        for _ in range(20_000):
            card = http.get("/v1/streams/big").json()
            if card["phase"] == "ended":
                break
        assert "too large" in card["said"]
        assert card["counts"]["encoded"] == 0
        assert http.delete("/v1/streams/big").status_code == 200


def test_nothing_is_left_behind(server: Served) -> None:
    """After all of the above: no place taken, no failure logged, and it answers."""
    with server.http() as http:
        assert http.get("/health").json() == {
            "status": "ok",
            "model": MODEL,
            "streams": 0,
            "requests": 0,
        }
        assert 'status="500"' not in http.get("/metrics").text
