"""A real server on loopback for tests: uvicorn in a thread, one model for all of them."""

from __future__ import annotations

import base64
import io
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
from PIL import Image

from foveate.commands.serve import server_of
from foveate.serve.limits import Limits
from foveate.serve.service import Access, ServeConfig, Service
from policies.reasoner import VideoReasoner
from stream.live.values import StreamConfig
from stream.reducers.base import Reducer

MODEL = "tiny-video"
CAMERA = "lavfi:testsrc2=size=64x48:rate=20"


@dataclass
class Served:
    service: Service
    port: int
    key: str = "any"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def http(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0)

    def refused(self, content: Any, **fields: Any) -> tuple[int, str]:
        """Status and code of a chat request that must fail."""
        with self.http() as http:
            reply = http.post("/v1/chat/completions", json=chat(content, **fields))
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return reply.status_code, error["code"]


@contextmanager
def served(
    reasoner: VideoReasoner, reducer: Reducer, access: Access | None = None, **limits: Any
) -> Iterator[Served]:
    config = ServeConfig(
        frames=2,
        limits=Limits(**limits),
        stream=StreamConfig(fps=4.0, tokens_per_s=100.0, window_frames=4, lag_frames=0),
    )
    access = access or Access()
    service = Service(config, access, reasoner, reducer, "test")
    listener = socket.create_server(("127.0.0.1", 0))
    server = server_of(service, head_s=1, grace_s=1)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Served(service, listener.getsockname()[1], access.api_key or "any")
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


def chat(content: Any, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}


def seen(url: str, question: str = "what moves?", kind: str = "video") -> list[dict[str, Any]]:
    """One medium and a question."""
    return [
        {"type": f"{kind}_url", f"{kind}_url": {"url": url}},
        {"type": "text", "text": question},
    ]


def data_url(data: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def png(width: int = 64, height: int = 48, shade: int = 90) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (shade, 20, 200)).save(file, "PNG")
    return file.getvalue()
