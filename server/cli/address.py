"""The sockets that a server listens on, bound before its model is loaded, so that a port in use is told at once.

A bound socket refuses connections until the server listens, so nobody waits at one that is still loading. Enter at
`bind` and `listen`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterable, Sequence

from server.errors import ConfigurationError

_BACKLOG = 2048
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""A name such as localhost may stand for addresses of which this machine lacks some."""


def bind(host: str, port: int) -> list[socket.socket]:
    """One for each address that the host stands for, all of one port, also where port 0 asks for a free one.

    Raises ConfigurationError, which names the setting, with nothing left bound.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no host name"
        raise ConfigurationError(f"host: {host!r} is no address of this machine ({reason})") from error
    bound: list[socket.socket] = []
    missing: OSError | None = None
    with contextlib.ExitStack() as undo:
        for family, address in dict.fromkeys((family, address) for family, *_, address in found):
            where = (address[0], port_of(bound) if bound else port, *address[2:])
            try:
                bound.append(undo.enter_context(_bound(family, where)))
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise _refused(host, port, error) from error
                missing = error
        if not bound:
            assert missing is not None, "a host has an address"
            raise _refused(host, port, missing) from missing
        undo.pop_all()
    return bound


def listen(sockets: Iterable[socket.socket], host: str) -> None:
    """Take connections from now on. Raises ConfigurationError when a server that was started meanwhile does already."""
    for bound in sockets:
        try:
            bound.listen(_BACKLOG)
        except OSError as error:
            raise _refused(host, bound.getsockname()[1], error) from error


def port_of(sockets: Sequence[socket.socket]) -> int:
    return sockets[0].getsockname()[1]


def _bound(family: int, address: tuple[object, ...]) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Else the connections of a server that has ended would hold the port for a minute.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # Not IPv4's addresses too, which have sockets of their own.
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(address)
    except BaseException:
        bound.close()
        raise
    return bound


def _refused(host: str, port: int, error: OSError) -> ConfigurationError:
    if error.errno == errno.EADDRINUSE:
        return ConfigurationError(f"port: {port} is in use on {host}; end what uses it or choose another (0: any)")
    if error.errno == errno.EACCES:
        return ConfigurationError(f"port: this user may not bind {port} on {host}; choose one above 1023")
    return ConfigurationError(f"host: {host} cannot be bound: {os.strerror(error.errno or 0)}")
