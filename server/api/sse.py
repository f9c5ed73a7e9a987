"""Server-sent events: JSON objects out, errors in mid-stream as an event, comments while nothing comes.

Who does not read what is sent is let go by the connection (`server.cli.http`), for all responses alike.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from functools import partial
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from server.api.handlers import error_body, generic_error
from server.api.json_text import json_pieces, json_text
from server.errors import RecontrolError

_log = logging.getLogger(__name__)
_DONE = b"data: [DONE]\n\n"
_PING = b": ping\n\n"
_LINE_ENDS = {end: f"\\u{ord(end):04x}" for end in "\u0085\u2028\u2029"}
"""Not line ends in an event stream, but many clients cut lines as Python's `splitlines` does. JSON may escape them."""
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""No cache keeps a stream, and nginx passes events on, which it would otherwise hold back until they fill a buffer."""
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}
"""What the OpenAPI document says of a route that answers as a whole or as events."""


class EventStream(StreamingResponse):
    """A response that ends with `[DONE]`, after an error event if the stream fails, which `failure` makes of the
    error's body. With `is_named` an event's name is its object's `type`, and the last event ends the stream by itself.
    Events that are bytes are ready.

    Whenever nothing was sent for `ping_s` seconds a comment goes out, which clients ignore, so that nothing on the way
    takes the connection for dead while a request waits or its prompt is computed; 0 sends none. `on_end` runs when the
    response is over, however it ends: sent, refused by the client, or never begun.
    """

    def __init__(
        self,
        events: AsyncGenerator[dict[str, Any] | bytes, None],
        *,
        on_end: Callable[[], Awaitable[None]],
        request_id: str,
        ping_s: float,
        failure: Callable[[dict[str, Any]], dict[str, Any]] = lambda body: body,
        is_named: bool = False,
    ) -> None:
        encode = partial(_event, is_named=is_named)
        encoded = _encoded(events, request_id, failure, encode, b"" if is_named else _DONE)
        super().__init__(encoded, media_type="text/event-stream", headers=_HEADERS)
        self._on_end = on_end
        self._ping_s = ping_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._on_end()

    async def stream_response(self, send: Send) -> None:
        """What the base class calls to send headers and events."""
        if not self._ping_s:
            await super().stream_response(send)
            return
        now_s = asyncio.get_running_loop().time
        silent_since_s = now_s()
        """Infinite while something is being sent, and once the last event was."""

        is_over = False

        async def send_event(message: Message) -> None:
            nonlocal silent_since_s, is_over
            is_over = is_over or message.get("body") is _DONE
            silent_since_s = math.inf
            await send(message)
            silent_since_s = math.inf if is_over else now_s()

        async def ping() -> None:
            while True:
                await asyncio.sleep(min(silent_since_s - now_s(), 0) + self._ping_s)
                if now_s() >= silent_since_s + self._ping_s:
                    await send_event({"type": "http.response.body", "body": _PING, "more_body": True})

        pinging = asyncio.create_task(ping())
        try:
            await super().stream_response(send_event)
        finally:
            pinging.cancel()


async def _encoded(
    events: AsyncGenerator[dict[str, Any] | bytes, None],
    request_id: str,
    failure: Callable[[dict[str, Any]], dict[str, Any]],
    encode: Callable[[dict[str, Any]], bytes],
    end: bytes,
) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(events):
        try:
            async for event in events:
                yield event if isinstance(event, bytes) else encode(event)
        except RecontrolError as error:
            yield encode(failure(error_body(error) if error.status < 500 else generic_error(error, request_id)))
        except Exception as error:
            _log.exception("Request %s failed in mid-stream", request_id)
            yield encode(failure(generic_error(error, request_id)))
        if end:
            yield end


def large_event(data: dict[str, Any], *, is_named: bool) -> bytes:
    """An event as it is sent, written in pieces, for a thread."""
    return _framed(json_pieces(data), data["type"] if is_named else None)


def _event(data: dict[str, Any], *, is_named: bool) -> bytes:
    return _framed((json_text(data),), data["type"] if is_named else None)


def _framed(pieces: Iterable[str], name: str | None) -> bytes:
    before = "data: " if name is None else f"event: {name}\ndata: "
    return before.encode() + b"".join(map(_on_one_line, pieces)) + b"\n\n"


def _on_one_line(text: str) -> bytes:
    if not text.isascii():
        for end, escape in _LINE_ENDS.items():
            text = text.replace(end, escape)
    return text.encode()
