"""Counts a caller's requests while they run, behind everything that a slow or broken client could hold them up in.

Enter at `Quota`.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.gate.context import context_of
from server.api.handlers import error_response
from server.errors import RateLimitError


class Quota:
    """Answers 429 to a caller that has no place left. One that is taken is given back when the response has ended."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = context_of(scope).caller if scope["type"] == "http" else None
        if caller is None:
            await self._app(scope, receive, send)
            return
        try:
            await caller.begin()
        except RateLimitError as error:
            await error_response(error, context_of(scope).request_id)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            caller.end()
