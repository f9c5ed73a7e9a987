"""Errors as OpenAI's body, and the two things every request passes: a request id and a limit on its size.

A 500 says nothing of the inside; it carries the request id, under which the log has the details. Enter at `install`.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Mapping
from typing import Any, get_type_hints

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.schemas import REFUSED, locate
from server.errors import OverloadedError, RecontrolError

_log = logging.getLogger(__name__)
REQUEST_ID_HEADER = "x-request-id"
_SHOWN_CHARS = 64
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TYPES = {429: "rate_limit_error", 404: "not_found_error", 503: "server_error", 500: "server_error"}


def error_body(error: RecontrolError) -> dict[str, Any]:
    return _body(error.status, error.message, error.param, error.code)


def generic_error(error: Exception, request_id: str) -> dict[str, Any]:
    """For a 5xx: our own messages are written for users, anything else stays in the log."""
    if isinstance(error, RecontrolError):
        return _body(error.status, f"{error.message} Request id: {request_id}.", error.param, error.code)
    return _body(500, f"An internal error occurred. Request id: {request_id}.", None, "internal_error")


def request_id_of(request: Request) -> str:
    return request.scope["state"]["request_id"]


def install(app: FastAPI, *, max_body_bytes: int) -> None:
    """Give the app its error handlers and middleware."""
    app.add_exception_handler(RecontrolError, _on_recontrol_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_middleware(_BodyLimit, max_body_bytes=max_body_bytes)
    # Outermost, so that every response carries the id and nothing unexpected gets past.
    app.add_middleware(_RequestId)


async def _on_recontrol_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RecontrolError)
    headers = {"Retry-After": str(error.retry_after_s)} if isinstance(error, OverloadedError) else None
    content = error_body(error) if error.status < 500 else generic_error(error, request_id_of(request))
    return JSONResponse(content, error.status, headers)


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    # An unknown field explains others that it was meant to be, so it goes first.
    errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = errors[0]
    path, allowed = locate(get_type_hints(request.scope["endpoint"])["body"], first["loc"][1:])
    context = first.get("ctx") or {}
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        path = [*path, context["discriminator"].strip("'")]
    if first["type"] in (REFUSED, "field"):
        return JSONResponse(_body(400, first["msg"], context["name"], _code(first["type"])), 400)
    # A name comes from the request, so only its beginning is sent back.
    where = ".".join(str(part)[:_SHOWN_CHARS] for part in path)
    if first["type"] == "json_invalid":
        return JSONResponse(
            _body(400, f"The body is not valid JSON: {context.get('error')}.", None, "invalid_json"), 400
        )
    if first["type"] == "extra_forbidden":
        message = f"{where}: there is no such field. Allowed here: {', '.join(allowed)}."
    else:
        message = f"{where or 'body'}: {first['msg'].removeprefix('Value error, ')}"
    return JSONResponse(_body(400, message, where or None, _code(first["type"])), 400)


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        message = f"There is no {request.method} {request.scope['path']}."
    elif error.status_code == 405:
        message = f"{request.method} is not allowed on {request.scope['path']}."
    else:
        message = str(error.detail)
    return JSONResponse(_body(error.status_code, message, None, None), error.status_code, error.headers)


def _code(pydantic_type: str) -> str:
    return {REFUSED: REFUSED, "extra_forbidden": "unknown_field", "missing": "missing_field"}.get(
        pydantic_type, "invalid_value"
    )


def _body(status: int, message: str, param: str | None, code: str | None) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _RequestId:
    """Takes the client's request id if it is harmless, else makes one; answers what nobody else caught."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)
        scope.setdefault("state", {})["request_id"] = request_id
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            _log.exception("Request %s failed", request_id)
            if has_started:
                raise
            await JSONResponse(generic_error(error, request_id), 500)(scope, receive, send_with_id)


class _BodyLimit:
    """Answers 413 before a large body is read, or while it is."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdecimal() or int(length) > self._max_body_bytes:
            await self._too_large()(scope, receive, send)
            return
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                await self._too_large()(scope, receive, send)
                return
            if not message.get("more_body"):
                break
        await self._app(scope, _replay(bytes(body), receive), send)

    def _too_large(self) -> JSONResponse:
        message = f"The body is larger than {self._max_body_bytes} bytes."
        return JSONResponse(_body(413, message, None, "body_too_large"), 413)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the whole body first, then whatever comes."""
    pending: list[Mapping[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replaying() -> Message:
        return dict(pending.pop()) if pending else await receive()

    return replaying
