"""Errors as OpenAI's body. A 500 says nothing of the inside; it carries the request id, under which the log has more.

Enter at `install` for what routes raise, at `error_response` for what is raised before them.
"""

from __future__ import annotations

import asyncio
from typing import Any, get_type_hints

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from server.api.gate.context import request_id_of
from server.api.gate.encodings import ENCODINGS
from server.api.schemas import locate
from server.errors import (
    AuthenticationError,
    ContentEncodingError,
    DeadlineExceededError,
    OverloadedError,
    RecontrolError,
    ShuttingDownError,
    SlowBodyError,
    UnknownHeadError,
)
from server.field_errors import KINDS, REFUSED, UNKNOWN
from server.unicode import beginning

_UNREADABLE_BODY = "There was an error parsing the body"
"""FastAPI's words for what is no JSON for another reason than its form."""
_HEADERS: dict[type[RecontrolError], dict[str, str]] = {
    ShuttingDownError: {"Retry-After": "5"},
    # OpenAI's clients would otherwise repeat what was too slow.
    DeadlineExceededError: {"x-should-retry": "false"},
    # What is left of the body must not be taken for the next request.
    SlowBodyError: {"Connection": "close"},
    ContentEncodingError: {"Accept-Encoding": ", ".join(ENCODINGS)},
    AuthenticationError: {"WWW-Authenticate": "Bearer"},
}
_TYPES = {429: "rate_limit_error", 404: "not_found_error", **dict.fromkeys((500, 503, 504), "server_error")}


def error_body(error: RecontrolError) -> dict[str, Any]:
    return _body(error.status, error.message, error.param, error.code)


def generic_error(error: Exception, request_id: str) -> dict[str, Any]:
    """For a 5xx: our own messages are written for users, anything else stays in the log."""
    if isinstance(error, RecontrolError):
        return _body(error.status, f"{error.message} Request id: {request_id}.", error.param, error.code)
    return _body(500, f"An internal error occurred. Request id: {request_id}.", None, "internal_error")


def error_response(error: RecontrolError, request_id: str) -> JSONResponse:
    content = error_body(error) if error.status < 500 else generic_error(error, request_id)
    return JSONResponse(content, error.status, _headers(error))


def install(app: FastAPI) -> None:
    """Give the app its error handlers."""
    app.add_exception_handler(RecontrolError, _on_recontrol_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)


async def _on_recontrol_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RecontrolError)
    return error_response(error, request_id_of(request))


def _headers(error: RecontrolError) -> dict[str, str] | None:
    if isinstance(error, OverloadedError):
        return {"Retry-After": str(error.retry_after_s)}
    return next((headers for kind, headers in _HEADERS.items() if isinstance(error, kind)), None)


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    # An unknown field explains others that it was meant to be, so it goes first.
    errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = errors[0]
    path, allowed = locate(get_type_hints(request.scope["endpoint"])["body"], first["loc"][1:])
    context = first.get("ctx") or {}
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        path = [*path, context["discriminator"].strip("'")]
    # A name comes from the request, so only its beginning is sent back.
    where = ".".join(beginning(str(part)) for part in path)
    if first["type"] in KINDS:
        holder = f"{where}." if where else ""
        content = _body(400, f"{holder}{first['msg']}", f"{holder}{context['name']}", _code(first["type"]))
        return JSONResponse(content, 400)
    if first["type"] == "string_pattern_mismatch" and path[0] in ("control", "heads"):
        # No head has such a name: a path, a URL, or code is never more than a name that is not known.
        field = path[:-2] if path[-1] == "[key]" else [part for part in path if isinstance(part, str)]
        unknown = UnknownHeadError(
            beginning(first["input"]), request.app.state.engine.info.heads, param=".".join(map(str, field))
        )
        return error_response(unknown, request_id_of(request))
    if first["type"] == "json_invalid":
        return JSONResponse(
            _body(400, f"The body is not valid JSON: {context.get('error')}.", None, "invalid_json"), 400
        )
    if first["type"] == "extra_forbidden":
        message = f"{where}: there is no such field. Allowed here: {', '.join(allowed)}."
    else:
        message = f"{where or 'body'}: {_reason(first)}"
    return JSONResponse(_body(400, message, where or None, _code(first["type"])), 400)


def _reason(error: dict[str, Any]) -> str:
    """What pydantic says of a value, in words of JSON. Behind a validator of ours it no longer knows that what it
    counts are letters."""
    reason: str = error["msg"].removeprefix("Value error, ")
    if error["type"] in ("dict_type", "model_type", "model_attributes_type"):
        return "Input should be an object"
    if error["type"] in ("too_long", "too_short") and isinstance(error["input"], str):
        kind, limit = ("at most", "max_length") if error["type"] == "too_long" else ("at least", "min_length")
        length = error["ctx"][limit]
        return f"String should have {kind} {length} character{'s' if length != 1 else ''}"
    return reason


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error.detail, RecontrolError):
        return error_response(error.detail, request_id_of(request))
    headers, code, path = error.headers, None, request.scope["path"]
    method = beginning(request.method)
    if error.status_code == 404:
        message = f"There is no {method} {beginning(path)}.{_where_it_is(path)}"
    elif error.status_code == 405:
        message = f"{method} is not allowed on {beginning(path)}.{_where_it_is(path)}"
        headers = {"Allow": await asyncio.to_thread(_allowed_methods, request, error)}
    elif error.detail == _UNREADABLE_BODY:
        code = "invalid_json"
        message = "The body is not JSON that can be read: nested too deep, a number of too many digits, or not UTF-8."
    else:
        message = str(error.detail)
    return JSONResponse(_body(error.status_code, message, None, code), error.status_code, headers)


def _where_it_is(path: str) -> str:
    if path == "/v1/heads" or path.startswith("/v1/management/"):
        return " Servers with `--management-keys` have management."
    return " `GET /openapi.json` has all paths."


def _allowed_methods(request: Request, error: HTTPException) -> str:
    """What the framework tells, which is of the path's first route, and what the document has of others."""
    told = (error.headers or {}).get("Allow", "").split(", ")
    described = request.app.openapi()["paths"].get(request.scope["path"], {})
    return ", ".join(sorted({*told, *map(str.upper, described)} - {""}))


def _code(pydantic_type: str) -> str:
    return {REFUSED: REFUSED, UNKNOWN: UNKNOWN, "extra_forbidden": "unknown_field", "missing": "missing_field"}.get(
        pydantic_type, "invalid_value"
    )


def _body(status: int, message: str, param: str | None, code: str | None) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
