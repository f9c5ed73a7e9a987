"""Limits on what a request brings: 431 for its headers, 413 for its body, 415 for a body that is not JSON
or in an encoding that is not known."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.gate.context import context_of
from server.api.gate.encodings import decoded
from server.api.handlers import error_response
from server.errors import BodyTooLargeError, HeadersTooLargeError, MediaTypeError, RecontrolError

MAX_HEADER_BYTES = 32 * 1024
_MAX_LENGTH_DIGITS = 15


class HeaderLimit:
    """Answers 431 to headers, and a request line, that are larger together than any client needs.

    What is beyond the protocol's own buffer never gets here; `server.cli.http` answers it alike.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            target = scope.get("raw_path") or b""
            size = sum(len(name) + len(value) for name, value in scope["headers"])
            if size + len(target) + len(scope["query_string"]) > MAX_HEADER_BYTES:
                error = HeadersTooLargeError(f"The headers are larger than {MAX_HEADER_BYTES} bytes.")
                await error_response(error, context_of(scope).request_id)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """Answers 413 before a large body is read, or while it is or is decoded; hands a whole, decoded body on."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except RecontrolError as error:
            await error_response(error, context_of(scope).request_id)(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """None when the client has gone.

        Raises BodyTooLargeError, MediaTypeError, and what `decoded` raises.
        """
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > _MAX_LENGTH_DIGITS or int(length) > self._max_body_bytes:
            raise self._too_large()
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                raise self._too_large()
            if not message.get("more_body"):
                break
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if body and media_type != "application/json":
            raise MediaTypeError("The body must be JSON, with the header `Content-Type: application/json`.")
        if body and (encoding := ",".join(headers.getlist("content-encoding"))):
            # In a thread, since it takes as long as the body is large.
            return await asyncio.to_thread(decoded, bytes(body), encoding, self._max_body_bytes)
        return bytes(body)

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(f"The body is larger than {self._max_body_bytes} bytes.")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the whole body first, then whatever comes."""
    pending: list[Mapping[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replaying() -> Message:
        return dict(pending.pop()) if pending else await receive()

    return replaying
