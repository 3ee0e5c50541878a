"""Every error in the shape that OpenAI's clients know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from stream.errors import FoveateError, UnknownNameError

from .limits import Refusal

KINDS = (FoveateError, RequestValidationError, HTTPException)
"""Those that are the request's fault; all others are the server's."""


async def say_error(request: Request, error: Exception) -> JSONResponse:
    """The answer to a request that failed with one of `KINDS`."""
    refusal = refusal_of(error)
    headers = getattr(error, "headers", None)
    return JSONResponse(refusal.body(), refusal.status, headers)


def refusal_of(error: Exception) -> Refusal:
    """An error with its HTTP status and code."""
    match error:
        case Refusal():
            return error
        case RequestValidationError():
            return _invalid(error.errors())
        case HTTPException():
            code = {404: "not_found", 405: "method_not_allowed"}.get(
                error.status_code, "invalid_request"
            )
            return Refusal(error.status_code, code, str(error.detail))
        case UnknownNameError():
            return Refusal(404, "not_found", str(error))
        case _:
            return Refusal(400, "invalid_request", str(error))


def _invalid(details: Sequence[Any]) -> Refusal:
    """Where the first few mistakes are, without repeating what was given."""
    wheres = [".".join(str(p)[:64] for p in d["loc"] if p != "body")[:200] for d in details]
    said = [f"{w or 'the body'}: {d['msg']}"[:300] for w, d in zip(wheres, details, strict=True)]
    return Refusal(400, "invalid_request", "; ".join(said[:5]), wheres[0] or None)
