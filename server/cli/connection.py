"""One client's connection: how long it may take to send, to read and to say nothing, and errors in our form.

uvicorn bounds the time between two requests alone. Here the headers of a request have a time limit too, a body that was
refused before it came, and what waits for a client that does not read; a body that is awaited has its limit in
`server.api.gate.sizes`. The number of connections is bounded. Enter at `Protocol`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import math
import sys
import termios
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Literal, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

_log = logging.getLogger(__name__)
_LEAST_BYTES_A_SECOND = 512
"""That a client has to take of what waits for it: who takes a byte now and then would hold it for days."""
_WITHOUT_REQUEST = (h11.IDLE, h11.SEND_BODY, h11.MUST_CLOSE, h11.CLOSED, h11.ERROR)
"""States of a client that has no whole request behind which another one could come."""
_MOST_BYTES_AHEAD = 64 * 1024
"""Of further requests, which a client sends before the response to the last one has come."""
_MOST_SMALL_CHUNKS = 4096
_LEAST_CHUNK_BYTES = 64
"""Of further chunks of a body on average. Each takes the event loop some 15 us, whatever it holds."""


@dataclass(slots=True)
class ConnectionLimits:
    """What clients may take of the server's time."""

    receive_timeout_s: float = 60.0
    """For the headers of a request."""
    send_timeout_s: float = 60.0
    """After which a client that takes nothing of what waits for it loses its connection."""
    keep_alive_s: float = 75.0
    """Without a request."""
    max_connections: int = 2048
    trusted_proxies: tuple[str, ...] = ()
    """Those whose word on the client's address (X-Forwarded-For) is taken."""
    response_timeout_s: float = math.inf
    """That a client may take to read a response, from when it first falls behind."""
    idle: dict[Protocol, None] = field(default_factory=dict)
    """Connections without a request that has begun, the longest idle first."""


class ServerConfig(uvicorn.Config):
    """uvicorn's own, with what our protocol has to know beside it."""

    limits: ConnectionLimits


class _RefusedError(h11.RemoteProtocolError):
    """What h11 would take, with a message for the client."""


class _Connection(h11.Connection):
    """h11's own, with less that it takes.

    It counts the chunks of a body: a quarter of a megabyte, which is read at one go, may hold 40,000 of a byte each,
    whether or not anybody still wants the body. And a body must have one length: of two a proxy before this server may
    believe the other one, and what it passes on as a body would be a request here.
    """

    _num_chunks = 0
    _num_bytes = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Raises _RefusedError."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._num_chunks = self._num_bytes = 0
            _check_framing(event)
        elif isinstance(event, h11.Data):
            self._num_chunks += event.chunk_start
            self._num_bytes += len(event.data)
            if self._num_chunks > _MOST_SMALL_CHUNKS + self._num_bytes // _LEAST_CHUNK_BYTES:
                raise _RefusedError(
                    f"The body comes in chunks of less than {_LEAST_CHUNK_BYTES} bytes, of which there may be "
                    f"{_MOST_SMALL_CHUNKS}; send larger ones."
                )
        return event


def _check_framing(request: h11.Request) -> None:
    """RFC 9112, 6.1 and 2.5. Raises _RefusedError."""
    names = {name for name, _ in request.headers}
    if b"transfer-encoding" in names and (b"content-length" in names or request.http_version < b"1.1"):
        raise _RefusedError(
            "Transfer-Encoding stands beside Content-Length, or in HTTP/1.0; a body must have one length."
        )
    if request.http_version not in (b"1.0", b"1.1"):
        raise _RefusedError("Only HTTP/1.0 and HTTP/1.1 are served.", error_status_hint=505)


class Protocol(H11Protocol):
    """Answers what is no HTTP, has too large headers or does not send them, with the same body as everything else.

    A client that takes nothing of what waits for it, for the time there is for that, loses its connection. The app sees
    that as it sees any client leave, so a response that nobody reads holds neither memory nor a slot for longer.
    """

    _awaited: Literal["headers", "body"] | None = None
    _receive_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None
    _slow_cycle: Any = None
    """The request whose response the client fell behind with, and the time by which it must have read it."""
    _due_s = math.inf

    def __init__(self, config: ServerConfig, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)
        self.conn = _Connection(h11.SERVER, config.h11_max_incomplete_event_size or _MOST_BYTES_AHEAD)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        limits = self._limits
        limits.idle[self] = None
        self.timeout_keep_alive_task = self.loop.call_later(limits.keep_alive_s, self.timeout_keep_alive_handler)
        if len(self.connections) > limits.max_connections:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)
            self._watch_sender()
            self._listen_on()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_sender()
        self._listen_on()

    def pause_writing(self) -> None:
        """Called by the transport when more is written than the client takes."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """Called by the transport when the client has taken most of it."""
        super().resume_writing()
        self._stop_watching(self._send_timer)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._send_timer, self._receive_timer, self.timeout_keep_alive_task):
            self._stop_watching(timer)
        self._limits.idle.pop(self, None)
        super().connection_lost(exc)

    def hurry(self, within_s: float) -> None:
        """The server ends: a client that is awaited, to read or to send a body, is awaited no longer than this."""
        if self.flow.write_paused:
            self._stop_watching(self._send_timer)
            self._watch_reader()
        elif self._awaited == "body":
            self.loop.call_later(within_s, self._end_if_unsent)

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn while it handles h11's error, which knows the better status."""
        error = sys.exc_info()[1]
        hint = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else HTTPStatus.BAD_REQUEST
        if isinstance(error, _RefusedError):
            self._refuse(HTTPStatus(hint), str(error))
        elif hint == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "The headers are too large.")
        else:
            self._refuse(HTTPStatus.BAD_REQUEST, msg)

    @property
    def _limits(self) -> ConnectionLimits:
        return cast(ServerConfig, self.config).limits

    def _make_room(self) -> None:
        """Close the connection that has been idle for longest, or this one where all others have requests."""
        longest = next(iter(self._limits.idle))
        del self._limits.idle[longest]
        if longest is self:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "There are too many connections; try again later.")
        else:
            longest.timeout_keep_alive_handler()

    def _watch_sender(self) -> None:
        """Start or stop the time that there is for what the client has to send next."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._limits.idle.pop(self, None)
        elif not self.transport.is_closing():
            self._limits.idle.setdefault(self, None)
        awaited = None
        if self.conn.their_state is h11.SEND_BODY:
            awaited = "body"
        elif self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            awaited = "headers"
        if awaited != self._awaited:
            self._awaited = awaited
            self._stop_watching(self._receive_timer)
            if awaited is not None:
                self._receive_timer = self.loop.call_later(self._limits.receive_timeout_s, self._end_unsent)

    def _listen_on(self) -> None:
        """Behind a whole request uvicorn stops reading when anything more has come, and would not see the client leave
        before the response is sent."""
        if self.transport.is_closing() or self.conn.their_state in _WITHOUT_REQUEST:
            return
        if len(self.conn.trailing_data[0]) <= _MOST_BYTES_AHEAD:
            self.flow.resume_reading()
        else:
            _log.info(
                "A client sends the next requests before it has the response to the last; its connection is closed"
            )
            self.transport.abort()

    def _end_unsent(self) -> None:
        if self.transport.is_closing():
            return
        if self._awaited == "headers":
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, "The headers were not complete in time.")
        elif self.cycle.response_complete:
            self.transport.close()
        else:
            # The app waits for the body, and has a limit of its own.
            self._awaited = None
            self._watch_sender()

    def _end_if_unsent(self) -> None:
        if self._awaited == "body" and not self.cycle.response_started:
            self.transport.abort()

    def _watch_reader(self) -> None:
        now_s, limits = self.loop.time(), self._limits
        if self._slow_cycle is not self.cycle:
            self._slow_cycle, self._due_s = self.cycle, now_s + limits.response_timeout_s
        timeout_s = max(min(limits.send_timeout_s, self._due_s - now_s), 0)
        least_bytes = max(int(timeout_s * _LEAST_BYTES_A_SECOND), 1)
        left = max(self._unread_bytes() - least_bytes, 0)
        self._send_timer = self.loop.call_later(timeout_s, self._end_if_unread, left)

    def _unread_bytes(self) -> int:
        """What the client has not acknowledged, here and in the kernel, which takes more of it only in leaps."""
        in_kernel = bytes(4)
        with contextlib.suppress(OSError):  # Not every system tells.
            in_kernel = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, in_kernel)
        return self.transport.get_write_buffer_size() + int.from_bytes(in_kernel, sys.byteorder)

    def _end_if_unread(self, most_bytes: int) -> None:
        unread_bytes = self._unread_bytes()
        if unread_bytes <= most_bytes and self.loop.time() < self._due_s:
            self._watch_reader()
            return
        _log.info("A client does not read the %d bytes that wait for it; its connection is closed", unread_bytes)
        self.transport.abort()

    def _stop_watching(self, timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        """Answer what is no request, or none yet, and hang up; where an answer has begun already, without another."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        kind = "server_error" if status >= 500 else "invalid_request_error"
        body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": None}}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            headers.append((b"retry-after", b"1"))
        for event in (
            h11.Response(status_code=status, headers=headers, reason=status.phrase.encode()),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        if self.cycle is not None:
            # The app may not have seen yet that there is nobody to answer any more.
            self.cycle.disconnected = True
