"""`foveate serve` against generated requests: schemathesis on its OpenAPI, and hostile chats.

pytest --slow -s tests/foveate/test_serve_fuzz.py prints what the long run counted.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from foveate.serve.service import Access
from policies.reasoner import VideoReasoner
from stream.reducers.base import Reducer
from stream.sources.survey import rss_mib

from .serving import CAMERA, MODEL, Served, data_url, png, served

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
LIMIT_S = 60.0

URLS = (
    "",
    "data:",
    "data:;base64,",
    "data:image/png;base64,iVBORw0KGgo=",
    data_url(png(), "image/png"),
    data_url(png(400, 400), "image/png"),
    data_url(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"),
    "file:///etc/passwd",
    "file:///proc/self/mem",
    "file:///tmp/../../etc/shadow",
    "file://host/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "http://127.0.0.1/",
    "http://[::1]:22/",
    "http://169.254.169.254/latest/meta-data/",
    "https://user:password@10.0.0.1/x",
    "http://0x7f.1/",
    "stream:",
    "stream:door",
    "stream:../door",
    "lavfi:movie=/etc/passwd",
    "javascript:alert(1)",
    "\x00",
)
TEXTS = st.text(max_size=30) | st.sampled_from(
    ("<video>", "<|im_end|>", "\x00", "%s%n", "x" * 3000)
)
NUMBERS = st.one_of(
    st.integers(), st.floats(), st.none(), st.booleans(), st.text(max_size=3), st.just(10**30)
)
MEDIA = st.builds(
    lambda kind, url: {"type": kind, kind: {"url": url}},
    st.sampled_from(("image_url", "video_url")),
    st.sampled_from(URLS) | st.text(max_size=20),
)
PARTS = st.one_of(
    MEDIA,
    TEXTS.map(lambda text: {"type": "text", "text": text}),
    st.sampled_from(({}, {"type": "audio"}, None, 1, {"type": "image_url", "image_url": "x"})),
)
MESSAGES = st.fixed_dictionaries(
    {
        "role": st.sampled_from(("user", "system", "assistant", "tool", "")),
        "content": st.one_of(TEXTS, st.lists(PARTS, max_size=4), st.none()),
    }
)
NONSENSE = st.fixed_dictionaries(
    {"model": st.just(MODEL), "messages": st.lists(MESSAGES, max_size=3)},
    optional={
        "stream": st.booleans(),
        "max_tokens": NUMBERS,
        "n": NUMBERS,
        "stop": TEXTS,
        "temperature": NUMBERS,
        "foveate": st.dictionaries(
            st.sampled_from(("retain", "frames", "fps", "span_s", "recall", "x")),
            NUMBERS | st.lists(NUMBERS, max_size=3),
            max_size=3,
        ),
    },
)
WELL_FORMED = st.fixed_dictionaries(
    {
        "model": st.just(MODEL),
        "messages": st.builds(
            lambda medium, text: [
                {"role": "user", "content": [medium, {"type": "text", "text": text}]}
            ],
            MEDIA,
            st.just("what?") | TEXTS,
        ),
    },
    optional={
        "stream": st.booleans(),
        "temperature": NUMBERS,
        "foveate": st.fixed_dictionaries(
            {},
            optional={
                "retain": st.floats(0, 1, exclude_min=True),
                "fps": st.floats(0, 240, exclude_min=True),
                "span_s": st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 2),
                "recall": st.booleans(),
            },
        ),
    },
)
"""Nothing is wrong with these but what they ask for."""


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the server puts what a request sends it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("scratch")
        patch.setattr(tempfile, "tempdir", str(folder))
        yield folder


@pytest.fixture(scope="module")
def server(
    serving: tuple[VideoReasoner, Reducer], scratch: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    access = Access(roots=(tmp_path_factory.mktemp("root"),), remote=True)
    limits = {"pixels": 300 * 300, "text_chars": 2000, "new_tokens": 2, "streams": 2, "frames": 4}
    with served(*serving, access, body_mib=1.0, **limits) as running:
        with running.http() as http:
            http.post("/v1/streams", json={"name": "door", "source": CAMERA + ":duration=1"})
        yield running


def sent(strategy: st.SearchStrategy[Any], count: int, send: Callable[[Any], int]) -> Counter[int]:
    """Sends `count` generated requests; how often each status came back."""
    seen: Counter[int] = Counter()

    @settings(
        max_examples=count,
        phases=[Phase.generate],
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def each(request: Any) -> None:
        seen[send(request)] += 1

    each()
    return seen


def never_broken(server: Served, count: int) -> dict[str, Counter[int]]:
    """Sends `count` generated requests to every operation that takes something, bodies as it wants
    them and as it does not, and ten times as many hostile chats."""
    seen: dict[str, Counter[int]] = {}
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    with requests.Session() as session, server.http() as http:

        def call(case: schemathesis.Case) -> int:
            reply = case.call(session=session, timeout=LIMIT_S)
            case.validate_response(reply, checks=CHECKS)
            return int(reply.status_code)

        def converse(chat: dict[str, Any]) -> int:
            head = {"content-type": "application/json"}
            body = json.dumps(chat).encode()
            reply = http.post("/v1/chat/completions", content=body, headers=head)
            assert reply.status_code < 500, reply.text
            if reply.status_code != 200:
                assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
            return reply.status_code

        for got in schema.get_all_operations():
            operation = got.ok()
            if not (operation.body or operation.path_parameters):
                call(operation.Case())
                continue
            for mode in GenerationMode if operation.body else [GenerationMode.POSITIVE]:
                strategy = operation.as_strategy(generation_mode=mode)
                seen[f"{operation.label}, {mode.value}"] = sent(strategy, count, call)
        seen["nonsense chats"] = sent(NONSENSE, 4 * count, converse)
        seen["hostile chats"] = sent(WELL_FORMED, 6 * count, converse)
        health = http.get("/health").json()
        assert (health["status"], health["requests"], health["streams"]) == ("ok", 0, 1)
    assert not list(Path(tempfile.gettempdir()).iterdir())
    return seen


def bad(seen: dict[str, Counter[int]]) -> int:
    return sum(n for kind in seen.values() for status, n in kind.items() if 400 <= status < 500)


def test_sixty_generated_requests_break_nothing(server: Served) -> None:
    assert bad(never_broken(server, 4)) >= 60


@pytest.mark.slow
def test_a_thousand_generated_requests_break_nothing(server: Served) -> None:
    never_broken(server, 4)
    began_s, before = time.monotonic(), held()
    seen = never_broken(server, 100)
    for kind, statuses in seen.items():
        told = ", ".join(f"{n} x {status}" for status, n in sorted(statuses.items()))
        sys.stdout.write(f"{kind}: {told}\n")
    total = sum(kind.total() for kind in seen.values())
    after = held()
    sys.stdout.write(
        f"{total} requests in {time.monotonic() - began_s:.0f} s, {bad(seen)} refused; no 5xx, no "
        f"hang; threads {before[0]} -> {after[0]}, open files {before[1]} -> {after[1]}, "
        f"resident {before[2]:.0f} -> {after[2]:.0f} MiB\n"
    )
    assert bad(seen) >= 1000
    assert after[0] <= before[0] + 2
    assert after[1] <= before[1] + 4
    assert after[2] <= before[2] + 100


def held() -> tuple[int, int, float]:
    """Threads, open files and resident MiB of this process, which is the server's too."""
    return threading.active_count(), len(os.listdir("/dev/fd")), rss_mib()
