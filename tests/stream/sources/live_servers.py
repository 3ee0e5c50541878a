"""Cameras and web servers on loopback, which can be stopped, stalled and frozen."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

from stream.sources.live import Live
from stream.sources.live_values import LiveFrame, LiveSettings
from tests.stream.sources.making import picture, write_video

SYSTEM_PYTHON = "/usr/bin/python3"
RTSP_PACKAGES = (
    "gir1.2-gst-rtsp-server-1.0 python3-gi gstreamer1.0-plugins-base gstreamer1.0-plugins-good "
    "gstreamer1.0-plugins-ugly gstreamer1.0-rtsp"
)
QUICK = LiveSettings(
    open_timeout_s=4.0, silent_s=0.8, frozen_s=1.0, retry_first_s=0.05, retry_cap_s=0.4
)
"""Short limits, so that tests need not wait long."""


def wait_until(met: Callable[[], Any], timeout_s: float = 15.0) -> Any:
    """What `met` gives as soon as it is true."""
    end_s = time.monotonic() + timeout_s
    while not (got := met()):
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.02)
    return got


def next_frame(source: Live, timeout_s: float = 15.0) -> LiveFrame:
    """The next frame, whatever silences come before it."""
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        if isinstance(got := source.take(0.5), LiveFrame):
            return got
    raise AssertionError(f"no frame within {timeout_s} s: {source.stats}")


class RtspServer:
    """GStreamer's RTSP server in a process of its own."""

    def __init__(self, size: str = "320x240", fps: int = 15) -> None:
        self.fps = fps
        self.port = 0
        self.start(size)

    def start(self, size: str = "320x240") -> None:
        """At the port it had before, if it had one."""
        script = Path(__file__).with_name("rtsp_server.py")
        self._process = subprocess.Popen(
            [SYSTEM_PYTHON, str(script), str(self.port), size, str(self.fps)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        words = self._process.stdout.readline().split()
        if words[:1] != ["ready"]:
            self._process.wait()
            raise RuntimeError(self._process.stderr.read().strip() or "no reason given")
        self.port = int(words[1])

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def stall(self) -> None:
        """Stop the process; its connections stay open and nothing comes through them."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def url(self, path: str = "moving") -> str:
        return f"rtsp://me:hunter2@127.0.0.1:{self.port}/{path}"


def rtsp_is_missing() -> str:
    """What a machine lacks for the RTSP tests; empty if nothing."""
    if shutil.which(SYSTEM_PYTHON) is None:
        return f"there is no {SYSTEM_PYTHON}"
    try:
        RtspServer().kill()
    except RuntimeError as error:
        return f"no RTSP server ({str(error).splitlines()[-1]}); apt-get install {RTSP_PACKAGES}"
    return ""


class _Quiet(BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def web_server(handler: Callable[..., BaseHTTPRequestHandler], port: int = 0) -> Iterator[int]:
    """The port of a web server on loopback."""
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class MjpegCamera:
    """A camera that serves motion JPEG; change its attributes while it runs."""

    def __init__(self, fps: int = 20) -> None:
        self.fps = fps
        self.size = (160, 96)
        self.still = False
        self.silent = False
        self.hang_up = False
        self.password = ""
        self.shown = 0
        self.visits: list[str] = []

    def jpeg(self) -> bytes:
        if not self.still:
            self.shown += 1
        data = io.BytesIO()
        Image.fromarray(picture(self.shown, *self.size)).save(data, "jpeg", quality=90)
        return data.getvalue()

    def handler(self) -> type[BaseHTTPRequestHandler]:
        camera = self

        class Handler(_Quiet):
            def do_GET(self) -> None:
                camera.visits.append(self.path)
                if camera.password and camera.password not in self.headers.get("Authorization", ""):
                    self.send_response(401)
                    self.send_header("WWW-Authenticate", 'Basic realm="camera"')
                    self.end_headers()
                    return
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=--cut")
                self.end_headers()
                while not camera.hang_up:
                    if not camera.silent:
                        data = camera.jpeg()
                        head = f"--cut\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}"
                        self.wfile.write(head.encode() + b"\r\n\r\n" + data + b"\r\n")
                    time.sleep(1 / camera.fps)

            def handle(self) -> None:
                with suppress(OSError):
                    super().handle()

        return Handler


def files_of(folder: Path) -> Callable[..., BaseHTTPRequestHandler]:
    """Serves a folder, without ranges."""

    class Handler(_Quiet, SimpleHTTPRequestHandler):
        pass

    return partial(Handler, directory=str(folder))


def write_hls(folder: Path, seconds: int = 8, fps: int = 10) -> Path:
    """A playlist with an end, and its segments of one second each."""
    return write_video(
        folder / "all.m3u8",
        frames=seconds * fps,
        fps=fps,
        options={"preset": "ultrafast", "g": str(fps), "sc_threshold": "0"},
        container_format="hls",
        container_options={"hls_time": "1", "hls_list_size": "0"},
    )


def live_hls(folder: Path, window: int = 4) -> type[BaseHTTPRequestHandler]:
    """Serves `write_hls`'s segments as a live stream that began `window` seconds ago, as
    /live.m3u8: the playlist shows the latest segments and has no end."""
    segments = re.findall(r"#EXTINF.*\n(.*\.ts)", (folder / "all.m3u8").read_text())
    began_s = time.monotonic()

    class Handler(_Quiet):
        def do_GET(self) -> None:
            if self.path == "/live.m3u8":
                first = min(int(time.monotonic() - began_s), len(segments) - window)
                lines = ["#EXTM3U", "#EXT-X-VERSION:3", "#EXT-X-TARGETDURATION:1"]
                lines.append(f"#EXT-X-MEDIA-SEQUENCE:{first}")
                for name in segments[first : first + window]:
                    lines += ["#EXTINF:1.0,", name]
                data = "\n".join(lines).encode() + b"\n"
            else:
                data = (folder / self.path.lstrip("/")).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler


@contextmanager
def mute_server() -> Iterator[int]:
    """The port of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def run_with_stdin(code: str) -> subprocess.Popen[bytes]:
    """Python code in a process whose standard input and output are pipes."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )
