"""A request's id, its line in the access log, and the answer to what nobody else caught. All other layers of the gate
lie within it."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import Callable

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.gate.context import CLIENT_CLOSED_REQUEST, RequestContext
from server.api.handlers import generic_error
from server.logs import request_id_var

_log = logging.getLogger(__name__)
_access = logging.getLogger("recontrol.access")
REQUEST_ID_HEADER = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LOGGED_PATH_CHARS = 256


class Identity:
    """Takes the client's request id if it is harmless, else makes one, and puts it on every response.

    `count` is told of each response's route, if there is one, and status.
    """

    def __init__(self, app: ASGIApp, count: Callable[[str | None, int], None]) -> None:
        self._app = app
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        context = RequestContext(given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12))
        scope.setdefault("state", {})["context"] = context
        request_id_var.set(context.request_id)
        started_s, status = time.monotonic(), CLIENT_CLOSED_REQUEST

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = context.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            _log.exception("Request %s failed", context.request_id)
            if status != CLIENT_CLOSED_REQUEST:
                raise
            await JSONResponse(generic_error(error, context.request_id), 500)(scope, receive, send_with_id)
        finally:
            self._count(getattr(scope.get("route"), "path", None), status)
            _write_line(scope, context, status, time.monotonic() - started_s)


def _write_line(scope: Scope, context: RequestContext, status: int, duration_s: float) -> None:
    """One line, whatever the request held: strings are written as JSON, where a line break is two characters."""
    client = scope.get("client")
    fields = {
        "method": scope["method"],
        "path": scope["path"][:_LOGGED_PATH_CHARS],
        "status": status,
        "duration_s": round(duration_s, 4),
        "client": client[0] if client else None,
        "request_id": context.request_id,
        **context.facts,
    }
    text = " ".join(f"{name}={json.dumps(value)}" for name, value in fields.items())
    _access.info("%s", text, extra={"fields": fields})
