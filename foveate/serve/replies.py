"""From an outcome to what the client reads: one document, or server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from stream.errors import FoveateError

from . import schemas
from .answering import Outcome
from .errors import refusal_of
from .running import Running


async def events(
    body: schemas.ChatRequest, running: Running, first: str | None
) -> AsyncIterator[str]:
    """Each text as far as it goes beyond the one before; then the evidence, and the usage if it is
    asked for. first: the first text, None if there is none."""
    head = {
        "id": running.id,
        "object": "chat.completion.chunk",
        "created": running.created,
        "model": body.model,
    }

    def chunk(delta: dict[str, str], finish: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return _event({**head, "choices": [choice], **more})

    try:
        yield chunk({"role": "assistant", "content": ""})
        sent, text = "", first
        while text is not None:
            if text.startswith(sent) and len(text) > len(sent) and not text.endswith("\ufffd"):
                yield chunk({"content": text[len(sent) :]})
                sent = text
            text = await running.texts.get()
        try:
            outcome = running.future.result()
        except FoveateError as error:
            yield _event(refusal_of(error).body())
            return
        if rest := outcome.answer.text.removeprefix(sent):
            yield chunk({"content": rest})
        yield chunk({}, outcome.finish, foveate=_evidence(outcome, body).model_dump())
        if body.stream_options and body.stream_options.include_usage:
            yield _event({**head, "choices": [], "usage": _usage(outcome).model_dump()})
        yield "data: [DONE]\n\n"
    finally:
        running.leave()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def reply_of(body: schemas.ChatRequest, running: Running, outcome: Outcome) -> schemas.ChatReply:
    """The whole answer as one document."""
    said = schemas.Said(content=outcome.answer.text)
    return schemas.ChatReply(
        id=running.id,
        created=running.created,
        model=body.model,
        choices=[schemas.Choice(message=said, finish_reason=outcome.finish)],
        usage=_usage(outcome),
        foveate=_evidence(outcome, body),
    )


def _usage(outcome: Outcome) -> schemas.Usage:
    read = outcome.text_tokens + outcome.tokens_out
    return schemas.Usage(
        prompt_tokens=read,
        completion_tokens=outcome.new_tokens,
        total_tokens=read + outcome.new_tokens,
        prompt_tokens_details=schemas.VisualTokens(
            visual_tokens_in=outcome.tokens_in, visual_tokens_out=outcome.tokens_out
        ),
    )


def _evidence(outcome: Outcome, body: schemas.ChatRequest) -> schemas.Evidence:
    return schemas.Evidence(
        tokens_in=outcome.tokens_in,
        tokens_out=outcome.tokens_out,
        retain=outcome.tokens_out / outcome.tokens_in,
        evidence_s=list(outcome.evidence_s),
        frame_age_s=outcome.frame_age_s,
        recalled=outcome.recalled,
        confidence=outcome.answer.confidence,
        timings_ms=outcome.timings_ms,
        notes=outcome.notes,
        ignored=body.ignored,
    )
