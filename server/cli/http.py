"""How uvicorn serves the app, on connections of our own (`connection.py`), and an end that drains.

Told to stop, the server stays reachable while what runs finishes: /ready answers 503 and new generations are refused.
After the grace period the engine stops, so that every stream that is left ends with an error event. Clients that are
awaited, to read or to send a body, are given two seconds of it. Enter at `DrainingServer`.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from typing import cast

import uvicorn
from fastapi import FastAPI

from server.cli.connection import ConnectionLimits, Protocol, ServerConfig

_log = logging.getLogger(__name__)
_MAX_EVENT_BYTES = 64 * 1024
_ENDING_S = 2
"""For the last events to reach their clients, and at the end for clients that are awaited."""
_OTHER_FILES = 256
"""Beside connections: the model's, libraries' and the engine's."""
_POLL_S = 0.05


class DrainingServer(uvicorn.Server):
    """Serves `app` on the sockets that `serve` is given (`address.py`).

    `grace_s` is what running requests get when it is told to stop.
    """

    def __init__(self, app: FastAPI, limits: ConnectionLimits, *, grace_s: float, log_level: str) -> None:
        config = ServerConfig(
            app,
            http=Protocol,
            # Nothing here speaks WebSocket, and connections that did would be none of ours, with its time limits.
            ws="none",
            # uvicorn hands it to the event loop, which takes fractions.
            timeout_keep_alive=cast(int, limits.keep_alive_s),
            # By default uvicorn believes every process of this machine.
            proxy_headers=bool(limits.trusted_proxies),
            forwarded_allow_ips=list(limits.trusted_proxies),
            h11_max_incomplete_event_size=_MAX_EVENT_BYTES,
            timeout_graceful_shutdown=_ENDING_S,
            # Our own lines are written by server.api.gate.identity, in the format that server.logs was told.
            log_config=None,
            access_log=False,
            log_level=log_level,
        )
        config.limits = limits
        super().__init__(config)
        self._limits = limits
        self._app = app
        self._grace_s = grace_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        _allow_open_files(self._limits.max_connections + _OTHER_FILES)
        await super().startup(sockets)
        urls = ", ".join(sorted({_url(bound) for bound in sockets or []}))
        _log.info("Uvicorn running on %s (Press CTRL+C to quit)", urls)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.is_draining = True
        # What they have read goes with them, and requests get all of the machine.
        self._app.state.jobs.stop()
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self._grace_s
        if self.server_state.tasks:
            _log.info("Finishing %d requests, for %g s at most", len(self.server_state.tasks), self._grace_s)
        self._limits.send_timeout_s = min(self._limits.send_timeout_s, _ENDING_S)
        for connection in list(self.server_state.connections):
            if isinstance(connection, Protocol):
                connection.hurry(_ENDING_S)
        while self.server_state.tasks and loop.time() < deadline_s and not self.force_exit:
            await asyncio.sleep(_POLL_S)
        await self._app.state.engine.stop()
        await super().shutdown(sockets)


def _url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if bound.family == socket.AF_INET6 else f"http://{host}:{port}"


def _allow_open_files(wanted: int) -> None:
    """As many as are wanted, or as the system lets this process have; without files nobody can connect."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < wanted:
        _log.warning("max_connections: the system lets this process open %d files, which are too few for all", most)
