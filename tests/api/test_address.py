"""The address is had, or refused in one line, before a model is loaded; idle connections stay open."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection

import httpx
import pytest
from fastapi import FastAPI

from server.cli import main
from server.cli.address import bind, listen, port_of
from server.errors import ConfigurationError
from server.settings import Settings
from tests.api.conftest import serving

NO_MODEL = ["serve", "--model", "/nonexistent"]
"""Whatever this says of the model is said after the address was bound."""


@contextlib.contextmanager
def taken(host: str) -> Iterator[int]:
    sockets = bind(host, 0)
    listen(sockets, host)
    try:
        yield port_of(sockets)
    finally:
        for one in sockets:
            one.close()


@pytest.mark.parametrize(
    ("host", "other"),
    [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("localhost", "127.0.0.1"), ("127.0.0.1", "0.0.0.0")],
)
def test_a_port_in_use_is_one_line_before_the_model_is_looked_at(
    host: str, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with taken(host) as port:
        assert main([*NO_MODEL, "--host", other, "--port", str(port), "--allow-public-bind"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"recontrol serve: port: {port} is in use on {other}; ")


@pytest.mark.parametrize("host", ["203.0.113.1", "no.such.host.invalid", "a" * 70 + ".x"])
def test_a_host_that_is_not_this_machine_is_one_line(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*NO_MODEL, "--host", host, "--port", "0", "--allow-public-bind"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("recontrol serve: host: ")
    assert host in line


def test_a_name_with_two_addresses_is_served_on_both_with_one_port(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [(socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_INET6, ("::1", 0, 0, 0))]
    found = [(family, socket.SOCK_STREAM, 6, "", where) for family, where in both]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    sockets = bind("localhost", 0)
    assert [one.getsockname()[:2] for one in sockets] == [("127.0.0.1", port_of(sockets)), ("::1", port_of(sockets))]
    for one in sockets:
        one.close()


def test_a_bound_port_refuses_until_it_is_listened_on_and_then_nobody_else_may() -> None:
    first, second = bind("127.0.0.1", 0), None
    port = port_of(first)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    second = bind("127.0.0.1", port)
    listen(first, "127.0.0.1")
    with pytest.raises(ConfigurationError, match=f"{port} is in use"):
        listen(second, "127.0.0.1")
    for one in (*first, *second):
        one.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may bind every port")
def test_a_port_that_needs_rights_says_so() -> None:
    with pytest.raises(ConfigurationError, match="may not bind 80"):
        bind("127.0.0.1", 80)


def test_an_idle_connection_is_kept_as_long_as_the_setting_says(make_app: Callable[..., FastAPI]) -> None:
    assert Settings.model_fields["keep_alive_s"].default > 60
    with (
        serving(make_app(), keep_alive_s=1.5) as url,
        contextlib.closing(HTTPConnection(url[7:], timeout=10)) as client,
    ):
        client.connect()
        first = client.sock
        for _ in range(3):
            time.sleep(0.8)
            client.request("GET", "/health")
            assert client.getresponse().read()
        assert client.sock is first
        assert first.recv(1) == b""
        client.close()


def test_ipv6_is_served(make_app: Callable[..., FastAPI]) -> None:
    from server.cli.connection import ConnectionLimits
    from server.cli.http import DrainingServer

    server = DrainingServer(make_app(), ConnectionLimits(), grace_s=0, log_level="warning")
    sockets = bind("::1", 0)
    listen(sockets, "::1")
    thread = threading.Thread(target=server.run, args=(sockets,))
    thread.start()
    try:
        assert httpx.get(f"http://[::1]:{port_of(sockets)}/health").status_code == 200
    finally:
        server.should_exit = True
        thread.join()
