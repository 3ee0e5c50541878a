"""`foveate serve` as OpenAI's own client meets it."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from foveate.commands.serve import access_of
from foveate.serve.service import Access
from policies.models import CHECKPOINTS
from policies.reasoner import VideoReasoner
from stream.errors import ConfigError
from stream.pipeline import run_inline
from stream.reducers.base import Reducer
from stream.sources import Uniform, open_source

from .serving import CAMERA, MODEL, Served, chat, data_url, png, seen, served

SAMPLES = CHECKPOINTS / "tiny_video" / "samples"
VIDEO = SAMPLES / "heldout_00020.mp4"
QUESTION = "What shape is the pink object?"


@pytest.fixture(scope="module")
def server(serving: tuple[VideoReasoner, Reducer]) -> Iterator[Served]:
    with served(*serving, Access(roots=(SAMPLES,)), queue=1) as running:
        yield running


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def until(server: Served, done: Any) -> dict[str, Any]:
    """The first answer of `/v1/streams/door` that is as wanted; a silent one within the limit."""
    with server.http() as http:
        for _ in range(20_000):
            row = http.get("/v1/streams/door").json()
            if done(row):
                return dict(row)
    raise AssertionError(row)


def test_a_video_is_answered_as_the_pipeline_does(
    client: openai.OpenAI, serving: tuple[VideoReasoner, Reducer]
) -> None:
    reasoner, reducer = serving
    with open_source(VIDEO) as source:
        expected = run_inline(
            source, Uniform(3), reasoner, reducer, reasoner, [QUESTION], retain=0.5
        )
    looking = {"foveate": {"frames": 3, "retain": 0.5}}
    for url in (f"file://{VIDEO}", data_url(VIDEO.read_bytes())):
        reply = client.chat.completions.create(
            **chat(seen(url, QUESTION), temperature=0.0), extra_body=looking
        )
        choice, usage = reply.choices[0], reply.usage
        assert choice.message.content == expected.reply.answers[0].text
        assert choice.finish_reason == "stop"
        assert usage is not None
        text = reasoner.text_tokens(QUESTION)
        assert usage.prompt_tokens == text + expected.step.tokens_out
        assert usage.completion_tokens == len(expected.reply.answers[0].token_ids)
        assert usage.prompt_tokens_details.visual_tokens_in == 3 * 196
        told = reply.foveate
        assert told["tokens_out"] == expected.step.tokens_out == 294
        assert told["retain"] == pytest.approx(0.5)
        assert told["evidence_s"][0][0] == 0.0
        assert told["evidence_s"][-1][1] == expected.video.pts_s[-1]
        assert set(told["timings_ms"]) > {"queue", "decode", "encode", "reduce", "prefill"}
        assert told["ignored"] == ["temperature"]


def test_streamed_words_add_up_to_the_plain_answer(client: openai.OpenAI) -> None:
    request = chat(seen(f"file://{VIDEO}", "How many objects are there?"))
    plain = client.chat.completions.create(**request)
    chunks = list(
        client.chat.completions.create(
            **request, stream=True, stream_options={"include_usage": True}
        )
    )
    texts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(texts) == plain.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == plain.choices[0].finish_reason
    assert chunks[-2].foveate["tokens_in"] == 2 * 196
    assert chunks[-1].choices == []
    assert chunks[-1].usage == plain.usage


def test_answers_end_at_the_asked_length(client: openai.OpenAI) -> None:
    question = "What happens in the video?"
    whole = client.chat.completions.create(**chat(seen(f"file://{VIDEO}", question)))
    usage = whole.usage
    assert usage is not None
    short = client.chat.completions.create(
        **chat(seen(f"file://{VIDEO}", question), max_tokens=max(1, usage.completion_tokens))
    )
    assert short.choices[0].finish_reason == "length"
    assert short.choices[0].message.content == whole.choices[0].message.content


def test_pictures_are_frames_and_earlier_turns_are_read(client: openai.OpenAI) -> None:
    pictures = [seen(data_url(png(shade=s), "image/png"), kind="image")[0] for s in (10, 200)]
    messages = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": [*pictures, {"type": "text", "text": "What color is it?"}]},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "And now?"},
    ]
    reply = client.chat.completions.create(model=MODEL, messages=messages)  # type: ignore[arg-type]
    assert reply.foveate["tokens_in"] == 2 * 196
    assert reply.foveate["evidence_s"][-1][1] == 1.0
    alone = client.chat.completions.create(model=MODEL, messages=[messages[1]])  # type: ignore[list-item]
    assert reply.usage is not None
    assert alone.usage is not None
    assert reply.usage.prompt_tokens > alone.usage.prompt_tokens


def test_models_and_health(client: openai.OpenAI, server: Served) -> None:
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "foveate"
    with pytest.raises(openai.NotFoundError, match="there is 'tiny-video'"):
        client.models.retrieve("gpt-4o")
    with pytest.raises(openai.NotFoundError, match="there is 'tiny-video'"):
        client.chat.completions.create(**{**chat(seen("stream:x")), "model": "other"})
    with server.http() as http:
        assert http.get("/health").json()["status"] == "ok"


def test_a_camera_is_attached_asked_counted_and_let_go(
    server: Served, client: openai.OpenAI
) -> None:
    with server.http() as http:
        card = http.post("/v1/streams", json={"name": "door", "source": CAMERA}).json()
        assert card["source"] == CAMERA
        again = http.post("/v1/streams", json={"name": "door", "source": CAMERA})
        assert (again.status_code, again.json()["error"]["code"]) == (409, "stream_exists")
        row = until(server, lambda r: r["counts"]["encoded"] >= 3)
        assert row["phase"] == "live"
        assert row["lag_s"]["0.5"] > 0

        reply = client.chat.completions.create(**chat(seen("stream:door")))
        told = reply.foveate
        assert told["tokens_in"] >= 3 * 196
        assert told["tokens_out"] < told["tokens_in"]
        assert told["frame_age_s"] > 0
        spans = told["evidence_s"]
        assert spans == sorted(spans)
        assert "encode" not in told["timings_ms"]
        past = client.chat.completions.create(
            **chat(seen("stream:door")), extra_body={"foveate": {"span_s": [0.0, 0.1]}}
        )
        assert past.foveate["evidence_s"][0][0] == 0.0
        assert past.foveate["evidence_s"][-1][1] <= spans[-1][1]

        scraped = {
            (s.name, s.labels.get("stream") or s.labels.get("stage"), s.labels.get("quantile")): (
                s.value
            )
            for family in text_string_to_metric_families(http.get("/metrics").text)
            for s in family.samples
        }
        for count in ("frames", "gated", "dropped", "segments", "tokens_in", "tokens_out"):
            assert ("foveate_stream_" + count + "_total", "door", None) in scraped
        assert scraped["foveate_stream_tokens_in_total", "door", None] >= 3 * 196
        assert scraped["foveate_stream_tokens_out_total", "door", None] > 0
        for quantile in ("0.5", "0.95", "0.99"):
            assert scraped["foveate_stream_lag_seconds", "door", quantile] > 0
            assert scraped["foveate_stage_seconds", "prefill", quantile] > 0
        assert scraped["foveate_streams", None, None] == 1

        assert http.delete("/v1/streams/door").json()["deleted"] is True
        assert http.delete("/v1/streams/door").status_code == 404
        assert http.get("/v1/streams").json()["data"] == []
    assert server.refused(seen("stream:door")) == (404, "stream_not_found")


def test_a_camera_that_ends_is_still_remembered(server: Served, client: openai.OpenAI) -> None:
    with server.http() as http:
        source = CAMERA + ":duration=1"
        assert http.post("/v1/streams", json={"name": "door", "source": source}).status_code == 200
        row = until(server, lambda r: r["phase"] == "ended")
        assert row["counts"]["encoded"] > 0
        reply = client.chat.completions.create(**chat(seen("stream:door")))
        assert reply.foveate["evidence_s"][-1][1] <= 1.0
        http.delete("/v1/streams/door")


def test_a_cameras_password_is_never_told(server: Served, caplog: Any) -> None:
    address = "rtsp://keeper:s3cret-w0rd@127.0.0.1:9/live?token=s3cret-w0rd"
    server.service.attach("door", address, {}, trusted=True).result()
    with server.http() as http:
        row = until(server, lambda r: r["said"])
        assert row["source"] == "rtsp://127.0.0.1:9/live"
        said = [
            row,
            http.get("/v1/streams").text,
            http.get("/metrics").text,
            http.post("/v1/streams", json={"name": "door", "source": address}).text,
            http.post("/v1/chat/completions", json=chat(seen("stream:door"))).text,
            http.post("/v1/chat/completions", json=chat(seen(address))).text,
            http.post(
                "/v1/chat/completions",
                json=chat(seen("http://keeper:s3cret-w0rd@10.0.0.1/a.mp4")),
            ).text,
            caplog.text,
        ]
        assert "stream_not_ready" in said[4]
        http.delete("/v1/streams/door")
    assert not [text for text in said if "s3cret" in str(text) or "keeper" in str(text)]


def test_the_queue_has_an_end_and_leaving_frees_a_place(server: Served) -> None:
    """The model is held; one request is worked on, one waits, a third is turned down; the one
    whose client leaves makes room."""
    held, entered = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert held.wait(30)

    server.service.worker.submit(hold)
    assert entered.wait(30)
    request = chat(seen(data_url(png(), "image/png"), kind="image"))

    def ask() -> int:
        with server.http() as http:
            return http.post("/v1/chat/completions", json=request).status_code

    def under_way(count: int) -> None:
        with server.http() as http:
            for _ in range(10_000):
                if http.get("/health").json()["requests"] == count:
                    return
        raise AssertionError(server.service.places.taken)

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(ask)
        under_way(1)
        body = json.dumps(request).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as leaver:
            leaver.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            under_way(2)
            assert server.refused(seen(data_url(png(), "image/png"), kind="image")) == (
                429,
                "queue_full",
            )
        under_way(1)
        second = pool.submit(ask)
        under_way(2)
        held.set()
        assert (first.result(60), second.result(60)) == (200, 200)
    under_way(0)


def test_beyond_this_machine_a_key_is_asked_for(tmp_path: Path, monkeypatch: Any) -> None:
    given: dict[str, Any] = {"roots": [tmp_path], "remote": False, "private": False}
    for host in ("0.0.0.0", "192.168.1.4", "::", "robot.local"):
        with pytest.raises(ConfigError, match="lets other machines in"):
            access_of(host, None, False, **given)
        assert access_of(host, None, True, **given).loopback is False
    for host in ("127.0.0.1", "localhost", "::1"):
        assert access_of(host, None, False, **given).loopback
    monkeypatch.setenv("SERVE_KEY", "k")
    assert access_of("0.0.0.0", "SERVE_KEY", False, **given).api_key == "k"
    monkeypatch.setenv("SERVE_KEY", " ")
    with pytest.raises(ConfigError, match="not set or empty"):
        access_of("0.0.0.0", "SERVE_KEY", False, **given)
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "no"))):
        access_of("localhost", None, False, [tmp_path / "no"], False, False)


@pytest.mark.slow
def test_the_command_serves_until_ctrl_c() -> None:
    arguments = ["serve", "--port", "0", "--stream", f"door={CAMERA}"]
    with subprocess.Popen(
        [sys.executable, "-m", "foveate", *arguments], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            place = process.stderr.readline()
            port = int(re.findall(r"http://127\.0\.0\.1:(\d+)/v1", place)[0])
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
                assert [s["name"] for s in http.get("/v1/streams").json()["data"]] == ["door"]
            process.send_signal(signal.SIGINT)
            said = process.stderr.read()
            assert process.wait(60) == 130
        finally:
            process.kill()
    assert "Traceback" not in said
