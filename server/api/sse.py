"""Server-sent events: JSON objects out, errors in mid-stream as an event, `[DONE]` last."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from server.api.handlers import error_body, generic_error
from server.errors import RecontrolError

_log = logging.getLogger(__name__)
_DONE = b"data: [DONE]\n\n"
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\u0085\u2028\u2029"}
"""Not line ends in an event stream, but many clients cut lines as Python's `splitlines` does. JSON may escape them."""
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}
"""What the OpenAPI document says of a route that answers as a whole or as events."""


class EventStream(StreamingResponse):
    """A response that ends with `[DONE]`, after an error event if the stream fails.

    `on_end` runs when the response is over, however it ends: sent, refused by the client, or never begun.
    """

    def __init__(
        self,
        events: AsyncGenerator[dict[str, Any], None],
        *,
        on_end: Callable[[], Awaitable[None]],
        request_id: str,
    ) -> None:
        super().__init__(
            _encoded(events, request_id), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._on_end()


async def _encoded(events: AsyncGenerator[dict[str, Any], None], request_id: str) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(events):
        try:
            async for event in events:
                yield _event(event)
        except RecontrolError as error:
            yield _event(error_body(error) if error.status < 500 else generic_error(error, request_id))
        except Exception as error:
            _log.exception("Request %s failed in mid-stream", request_id)
            yield _event(generic_error(error, request_id))
        yield _DONE


def _event(data: dict[str, Any]) -> bytes:
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_LINE_ENDS)
    return f"data: {text}\n\n".encode()
