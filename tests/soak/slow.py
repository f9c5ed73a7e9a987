"""Clients that are slow to send or to read, and crowds that hold many connections.

They have bare sockets, since a library reads ahead of whoever uses it. Enter at `exchange` and `Crowd`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import h11

from tests.soak.plan import Pace
from tests.soak.seen import Seen

_SEGMENT_BYTES = 536
"""The kernel keeps some megabytes of what nobody reads, but some 120 kB for a client of small segments ..."""
_RECEIVE_BYTES = 4096
"""... and a small buffer."""
_READ_BYTES = 65_536
_NUM_PIECES = 4
_MOST_PROBES, _PROBE_S = 20, 0.1


async def exchange(
    url: str, method: str, path: str, content: bytes, headers: Mapping[str, str], *, pace: Pace, timeout_s: float
) -> Seen:
    """Send a request and read its answer at this pace."""
    seen, place = Seen(), urlsplit(url)
    try:
        async with asyncio.timeout(timeout_s), _connection(place.hostname or "", place.port or 80) as connection:
            sender = h11.Connection(h11.CLIENT)
            fields = {"host": place.netloc, "content-length": str(len(content)), "connection": "close", **headers}
            head = sender.send(h11.Request(method=method, target=path, headers=list(fields.items()))) or b""
            await _send(connection, head, content, pace)
            sender.send(h11.Data(data=content))
            sender.send(h11.EndOfMessage())
            await _read(connection, sender, seen, pace)
    except (OSError, TimeoutError, h11.RemoteProtocolError) as error:
        seen.error = repr(error)
    return seen


class Crowd:
    """So many connections, each with a request whose body does not come, that a server takes no more."""

    def __init__(self, url: str, size: int, headers: Mapping[str, str]) -> None:
        self._place, self._size, self._headers = urlsplit(url), size, headers

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """From when one more has been refused, or so many have not been."""
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(self._size):
                await self._join(stack)
            for _ in range(_MOST_PROBES):
                connection = await self._join(stack)
                with contextlib.suppress(OSError, TimeoutError):
                    async with asyncio.timeout(_PROBE_S):
                        await asyncio.get_running_loop().sock_recv(connection, _READ_BYTES)
                        break
            yield

    async def _join(self, stack: contextlib.AsyncExitStack) -> socket.socket:
        """Send the headers of a request on one more connection."""
        fields = {"host": self._place.netloc, "content-length": "9", **self._headers}
        lines = ["POST /v1/completions HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        place = self._place.hostname or "", self._place.port or 80
        connection = await stack.enter_async_context(_connection(*place))
        with contextlib.suppress(OSError):
            await asyncio.get_running_loop().sock_sendall(connection, "\r\n".join([*lines, "", ""]).encode())
        return connection


@contextlib.asynccontextmanager
async def _connection(host: str, port: int) -> AsyncIterator[socket.socket]:
    with socket.socket() as connection:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SEGMENT_BYTES)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
        await asyncio.get_running_loop().sock_connect(connection, (host, port))
        yield connection


async def _send(connection: socket.socket, head: bytes, content: bytes, pace: Pace) -> None:
    loop = asyncio.get_running_loop()
    if pace.is_body_cut:
        content = content[: len(content) // 2]
    await loop.sock_sendall(connection, head)
    size = max(1, -(-len(content) // _NUM_PIECES))
    for start in range(0, len(content), size):
        await asyncio.sleep(pace.body_s)
        await loop.sock_sendall(connection, content[start : start + size])


async def _read(connection: socket.socket, sender: h11.Connection, seen: Seen, pace: Pace) -> None:
    """Until the answer's end, or until the client goes."""
    loop, body = asyncio.get_running_loop(), bytearray()
    while True:
        for event in _events(sender):
            if isinstance(event, h11.Response):
                seen.status = event.status_code
                seen.headers = {name.decode(): value.decode() for name, value in event.headers}
                await asyncio.sleep(pace.unread_s)
                if pace.leaves and seen.is_stream:
                    seen.has_left = True
                    return
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                seen.take(body.decode())
                return
        sender.receive_data(await loop.sock_recv(connection, _READ_BYTES))


def _events(sender: h11.Connection) -> Iterator[Any]:
    """Those that have come whole. Raises RemoteProtocolError for an answer that breaks off."""
    while (event := sender.next_event()) is not h11.NEED_DATA:
        yield event
        if isinstance(event, h11.EndOfMessage):
            return
