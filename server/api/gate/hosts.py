"""Pages of other sites cannot use a server without keys through a browser that can reach it.

A page of another site sends its own address as `Origin`. One whose name is made to point here afterwards (DNS
rebinding) passes for the server's own page, but the browser then sends that name as `Host`. So both are held against
lists. Names that no stranger can own need no list: addresses in digits, names without a dot, and the endings that are
kept for networks of one's own. Enter at `HostGuard`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import ip_address

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.gate.context import context_of
from server.api.handlers import error_response
from server.errors import PermissionDeniedError

_OWN_ENDINGS = (".localhost", ".local", ".internal", ".svc")
"""RFC 6761, RFC 6762, ICANN's reservation of 2024, and Services of Kubernetes."""
_HOST = re.compile(r"(?P<name>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>\d{1,5}))?")
_ORIGIN = re.compile(r"(?P<scheme>https?)://(?P<host>.+)")
_DEFAULT_PORTS = {"http": "80", "https": "443"}
ANY = "*"


class HostGuard:
    """Answers 403 to a Host that is not this server's, and to an Origin that is neither that host nor allowed."""

    def __init__(
        self, app: ASGIApp, *, hosts: Sequence[str], origins: Sequence[str], public_paths: frozenset[str]
    ) -> None:
        """`hosts` are names beside those that nobody else can own; `*` is every name, or every origin."""
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts)
        self._origins = frozenset(origins)
        self._public_paths = public_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._public_paths:
            problem = self._problem(scope)
            if problem is not None:
                error = PermissionDeniedError(problem)
                await error_response(error, context_of(scope).request_id)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _problem(self, scope: Scope) -> str | None:
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        origins = [value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"]
        if not all(self._is_own(host) for host in hosts) or len(hosts) > 1:
            return (
                "The Host header names no host of this server. Name it in --allowed-hosts; a server with keys and "
                "without that setting takes any."
            )
        if all(origin in self._origins or _is_same(origin, hosts) for origin in origins) or ANY in self._origins:
            return None
        return "Pages of another origin may not use this server, which has no keys, unless --allowed-origins names it."

    def _is_own(self, host: str) -> bool:
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = match["name"].lower().rstrip(".")
        if ANY in self._hosts or name in self._hosts:
            return True
        return "." not in name or name.endswith(_OWN_ENDINGS) or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _is_same(origin: str, hosts: Sequence[str]) -> bool:
    """Whether a page came from the host that it asks, whatever scheme a proxy in front has."""
    match = _ORIGIN.fullmatch(origin)
    if match is None:
        return False
    default = _DEFAULT_PORTS[match["scheme"]]
    own = _with_port(match["host"], default)
    return own is not None and any(own == _with_port(host, default) for host in hosts)


def _with_port(host: str, default: str) -> tuple[str, str] | None:
    match = _HOST.fullmatch(host)
    return None if match is None else (match["name"].lower(), match["port"] or default)
