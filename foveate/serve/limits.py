"""What one request may ask for, what all together may, and how a refusal says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import Field

from stream.config import Config
from stream.errors import FoveateError


class Limits(Config):
    """Each has an error of its own; all are checked before the work they limit is done.

    body_mib: of a request, and of a file fetched for it. text_chars: of all its messages.
    pixels: of one picture. frames: of one request. duration_s: of a video.
    new_tokens: of an answer. streams: attached at once. queue: requests that wait for the model,
    beside the one it works on. request_s: from a request's first byte to the last of its reply.
    """

    body_mib: float = Field(default=64.0, gt=0, le=4096)
    text_chars: int = Field(default=16_384, ge=1)
    pixels: int = Field(default=3840 * 2160, ge=1)
    frames: int = Field(default=64, ge=1, le=1024)
    duration_s: float = Field(default=3600.0, gt=0, allow_inf_nan=False)
    new_tokens: int = Field(default=256, ge=1)
    streams: int = Field(default=4, ge=0)
    queue: int = Field(default=8, ge=0)
    request_s: float = Field(default=60.0, gt=0, allow_inf_nan=False)

    @property
    def body_bytes(self) -> int:
        return int(self.body_mib * (1 << 20))


class Refusal(FoveateError):
    """A request is turned down: an HTTP status, and the fields of OpenAI's errors.

    code: a stable name of the reason. param: the field of the request that it is about.
    """

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        said = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": {k: v and writable(v) for k, v in said.items()}}


def writable(text: str) -> str:
    """`text` as UTF-8 can hold it: half a surrogate pair becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


class Places:
    """Places for requests under way; used by one thread."""

    def __init__(self, limits: Limits) -> None:
        self._most = 1 + limits.queue
        self.taken = 0

    @contextmanager
    def take(self) -> Iterator[None]:
        """A place for the block; refused at once if there is none."""
        if self.taken >= self._most:
            raise Refusal(
                429,
                "queue_full",
                f"{self.taken} requests are under way, which is all that may be; try again "
                "in a moment.",
            )
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1
