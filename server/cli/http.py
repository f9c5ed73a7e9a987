"""How uvicorn serves the app: its protocol's own errors in our form, readers that do not read, and an end that drains.

Told to stop, the server stays reachable while what runs finishes: /ready answers 503 and new generations are refused.
After the grace period the engine stops, so that every stream that is left ends with an error event. Enter at
`DrainingServer`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import socket
import sys
import termios
from http import HTTPStatus
from typing import cast

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

_log = logging.getLogger(__name__)
_MAX_EVENT_BYTES = 64 * 1024
_ENDING_S = 2
"""For the last events to reach their clients."""
_POLL_S = 0.05


class _Config(uvicorn.Config):
    """uvicorn's own, with what our protocol has to know beside it."""

    send_timeout_s: float


class Protocol(H11Protocol):
    """Answers what is no HTTP, or has too large headers, with the same body as everything else.

    A client that takes nothing of what waits for it, for the time there is for that, loses its connection. The app sees
    that as it sees any client leave, so a response that nobody reads holds neither memory nor a slot for longer.
    """

    _send_timer: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        """Called by the transport when more is written than the client takes."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """Called by the transport when the client has taken most of it."""
        super().resume_writing()
        self._stop_watching()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def _watch_reader(self) -> None:
        assert isinstance(self.config, _Config)
        timeout_s, unread_bytes = self.config.send_timeout_s, self._unread_bytes()
        self._send_timer = self.loop.call_later(timeout_s, self._end_if_unread, unread_bytes)

    def _unread_bytes(self) -> int:
        """What the client has not acknowledged, here and in the kernel, which takes more of it only in leaps."""
        in_kernel = bytes(4)
        with contextlib.suppress(OSError):  # Not every system tells.
            in_kernel = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, in_kernel)
        return self.transport.get_write_buffer_size() + int.from_bytes(in_kernel, sys.byteorder)

    def _stop_watching(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()

    def _end_if_unread(self, unread_bytes: int) -> None:
        if self._unread_bytes() < unread_bytes:
            self._watch_reader()
            return
        _log.info("A client took nothing of the %d bytes that waited for it; its connection is closed", unread_bytes)
        self.transport.abort()

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
    """Serves `app` on the sockets that `serve` is given (`address.py`).

    `grace_s` is what running requests get when it is told to stop, `send_timeout_s` what a client gets to take
    something of what waits for it, and `keep_alive_s` how long a connection without a request stays open.
    """

    def __init__(
        self, app: FastAPI, *, grace_s: float, send_timeout_s: float, keep_alive_s: float, log_level: str
    ) -> None:
        config = _Config(
            app,
            http=Protocol,
            # uvicorn hands it to the event loop, which takes fractions.
            timeout_keep_alive=cast(int, keep_alive_s),
            h11_max_incomplete_event_size=_MAX_EVENT_BYTES,
            timeout_graceful_shutdown=_ENDING_S,
            # Our own lines are written by server.api.gate.identity, in the format that server.logs was told.
            log_config=None,
            access_log=False,
            log_level=log_level,
        )
        config.send_timeout_s = send_timeout_s
        super().__init__(config)
        self._app = app
        self._grace_s = grace_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        urls = ", ".join(sorted({_url(bound) for bound in sockets or []}))
        _log.info("Uvicorn running on %s (Press CTRL+C to quit)", urls)

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


def _url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if bound.family == socket.AF_INET6 else f"http://{host}:{port}"
