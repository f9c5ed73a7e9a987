"""Limits on what a request brings: 431 for its headers, 413 for its body, 408 for a body that does not come, 415 for
one that is not JSON or in an encoding that is not known, and 429 where too many large bodies are on their way."""

from __future__ import annotations

import asyncio
import codecs
import re
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.gate.context import context_of
from server.api.gate.encodings import decoded
from server.api.handlers import error_response
from server.errors import (
    BodyTooLargeError,
    HeadersTooLargeError,
    InvalidJsonError,
    InvalidRequestError,
    MediaTypeError,
    OverloadedError,
    RecontrolError,
    SlowBodyError,
)
from server.unicode import beginning

MAX_HEADER_BYTES = 32 * 1024
MAX_PARTS = 2**17
"""Objects and lists in a body."""
MAX_MEMBERS = 2**16
"""Fields of all its objects."""
_MOST_BODIES = 64
"""Of the largest size, that are on their way at once."""
_SMALL_BYTES = 2**16
"""Of a body that is always taken; connections bound their number."""
_MAX_LENGTH_DIGITS = 15
_MARKS = re.compile(rb"[\[\]{}:]")


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
    """Answers 413 before a large body is read, or while it is or is decoded; hands a whole, decoded body on.

    A body has `receive_timeout_s` from its headers on, however it trickles in; then the answer is 408. Large bodies
    that are on their way may take as much memory together as 64 of the largest; one more is answered 429.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, receive_timeout_s: float) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._receive_timeout_s = receive_timeout_s
        self._num_held_bytes = 0
        """Of bodies that are on their way."""

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
            context_of(scope).num_body_bytes = len(body)
            await self._app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """None when the client has gone.

        Raises BodyTooLargeError, OverloadedError, SlowBodyError, MediaTypeError, InvalidJsonError, InvalidRequestError
        for one of too many parts, and what `decoded` raises.
        """
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > _MAX_LENGTH_DIGITS or int(length) > self._max_body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(self._receive_timeout_s):
                body = await self._received(receive)
        except TimeoutError as error:
            raise SlowBodyError(f"The body was not complete after {self._receive_timeout_s:g} s.") from error
        if body is None:
            return None
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if body and media_type != "application/json":
            raise MediaTypeError("The body must be JSON, with the header `Content-Type: application/json`.")
        if body and (encoding := ",".join(headers.getlist("content-encoding"))):
            # In a thread, since it takes as long as the body is large.
            body = await asyncio.to_thread(decoded, body, encoding, self._max_body_bytes)
        if _is_wide(body):
            raise InvalidJsonError("The body is not UTF-8, which JSON between programs has to be.")
        if _may_have_many_parts(body):
            await asyncio.to_thread(_refuse_many_parts, body)
        return body

    async def _received(self, receive: Receive) -> bytes | None:
        """None when the client has gone. Raises BodyTooLargeError, OverloadedError."""
        body = bytearray()
        try:
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    return None
                part = message.get("body", b"")
                body += part
                self._num_held_bytes += len(part)
                if len(body) > self._max_body_bytes:
                    raise self._too_large()
                if not message.get("more_body"):
                    return bytes(body)
                if len(body) > _SMALL_BYTES and self._num_held_bytes > _MOST_BODIES * self._max_body_bytes:
                    raise OverloadedError("Too many large bodies are on their way; try again later.")
        finally:
            self._num_held_bytes -= len(body)

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(f"The body is larger than {self._max_body_bytes} bytes.")


def _is_wide(body: bytes) -> bool:
    """Python would read UTF-16 and UTF-32 too, of which nothing here counts the marks. JSON begins with an ASCII
    character, behind the mark for the order of bytes where there is one."""
    return b"\0" in body[:4] or body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


def _may_have_many_parts(body: bytes) -> bool:
    """Python takes a second to make a million lists, and holds up everything meanwhile."""
    return body.count(b"[") + body.count(b"{") > MAX_PARTS or body.count(b":") > MAX_MEMBERS


def _refuse_many_parts(body: bytes) -> None:
    """Read the body's marks outside of its texts, and no further than it is allowed to go.

    Raises InvalidRequestError, which names the field in which it has too many parts.
    """
    # Of what is split at quotes, every other one is a text; in those that are left of these, no text ends.
    between = body.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')
    depth = num_parts = num_members = 0
    field = b""
    for index in range(0, len(between), 2):
        for found in _MARKS.finditer(between[index]):
            mark = found[0]
            depth += (mark in b"[{") - (mark in b"]}")
            num_parts += mark in b"[{"
            num_members += mark == b":"
            if mark == b":" and depth == 1:
                field = between[index - 1]
            if num_parts > MAX_PARTS or num_members > MAX_MEMBERS:
                most = f"{MAX_PARTS} objects and lists" if num_parts > MAX_PARTS else f"{MAX_MEMBERS} fields in all"
                name = beginning(field.decode(errors="replace")) or None
                where = "" if name is None else f" before the end of `{name}`"
                raise InvalidRequestError(f"The body has more than {most}{where}.", param=name)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the whole body first, then whatever comes."""
    pending: list[Mapping[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replaying() -> Message:
        return dict(pending.pop()) if pending else await receive()

    return replaying
