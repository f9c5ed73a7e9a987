"""How uvicorn serves the app: its protocol's own errors in our form, and an end that drains.

Told to stop, the server stays reachable while what runs finishes: /ready answers 503 and new generations are refused.
After the grace period the engine stops, so that every stream that is left ends with an error event. Enter at
`DrainingServer`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
from http import HTTPStatus

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

_log = logging.getLogger(__name__)
_MAX_EVENT_BYTES = 64 * 1024
_ENDING_S = 2
"""For the last events to reach their clients."""
_POLL_S = 0.05


class Protocol(H11Protocol):
    """Answers what is no HTTP, or has too large headers, with the same body as everything else."""

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn while it handles h11's error, which knows the better status."""
        error = sys.exc_info()[1]
        hint = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else HTTPStatus.BAD_REQUEST
        status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE if hint == 431 else HTTPStatus.BAD_REQUEST
        if status != HTTPStatus.BAD_REQUEST:
            msg = "The headers are too large."
        detail = {"message": msg, "type": "invalid_request_error", "param": None, "code": None}
        body = json.dumps({"error": detail}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for event in (
            h11.Response(status_code=status, headers=headers, reason=status.phrase.encode()),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class DrainingServer(uvicorn.Server):
    """Serves `app` on an address; `grace_s` is what running requests get when it is told to stop."""

    def __init__(self, app: FastAPI, *, host: str, port: int, grace_s: float, log_level: str) -> None:
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            http=Protocol,
            h11_max_incomplete_event_size=_MAX_EVENT_BYTES,
            timeout_graceful_shutdown=_ENDING_S,
            # Our own lines are written by server.api.gate.identity, in the format that server.logs was told.
            log_config=None,
            access_log=False,
            log_level=log_level,
        )
        super().__init__(config)
        self._app = app
        self._grace_s = grace_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.is_draining = True
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self._grace_s
        if self.server_state.tasks:
            _log.info("Finishing %d requests, for %g s at most", len(self.server_state.tasks), self._grace_s)
        while self.server_state.tasks and loop.time() < deadline_s and not self.force_exit:
            await asyncio.sleep(_POLL_S)
        await self._app.state.engine.stop()
        await super().shutdown(sockets)
