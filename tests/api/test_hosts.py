"""A server without keys is safe from web pages: those of other sites, and those whose name is made to point here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import ValidationError
from starlette.testclient import TestClient

from server.cli import main
from server.settings import Settings

OWN = ["127.0.0.1", "127.0.0.1:8000", "localhost", "LOCALHOST:8000", "localhost.", "[::1]:8000", "10.0.0.7", "own",
       "recontrol.default.svc", "box.local", "a.localhost", "recontrol.default.svc.cluster.local"]  # fmt: skip
OTHERS = ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "evil.com.", "",
          "127.0.0.1@evil.example", "evil.example/", "127.0.0.1:8000:1", "a b", "evil.example#.local", "[::1].evil.io",
          "1.2.3.4.nip.io", "\x00", "evil.example?.internal", "0x7f.1"]  # fmt: skip


def status(client: TestClient, host: str | None = None, origin: str | None = None, path: str = "/v1/models") -> int:
    given = {"Host": host, "Origin": origin}
    return client.get(path, headers={name: value for name, value in given.items() if value is not None}).status_code


def test_only_names_that_no_stranger_can_own_reach_a_server_without_keys(client: TestClient) -> None:
    assert [status(client, host) for host in OWN] == [200] * len(OWN)
    assert [status(client, host) for host in OTHERS] == [403] * len(OTHERS)
    assert [status(client, host, path="/health") for host in OTHERS] == [200] * len(OTHERS)
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 403


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:9", "https://127.0.0.1:8000.evil.io", "file://", "",
               "chrome-extension://abc", "http://127.0.0.1:8000/", "http://localhost:8000"]
)  # fmt: skip
def test_pages_of_other_origins_do_not(client: TestClient, origin: str) -> None:
    assert status(client, "127.0.0.1:8000", origin) == 403
    headers = {"Host": "127.0.0.1:8000", "Origin": origin, "Content-Type": "text/plain"}
    assert client.post("/v1/completions", content="{}", headers=headers).status_code == 403


def test_its_own_page_does_also_behind_a_proxy_with_tls(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(settings={"allowed_hosts": "Api.example"})) as client:
        for host, origin in (
            ("127.0.0.1:8000", "http://127.0.0.1:8000"), ("api.example", "https://api.example"),
            ("api.example:443", "https://api.example"), ("[::1]:8000", "http://[::1]:8000"),
        ):  # fmt: skip
            assert status(client, host, origin) == 200
        assert status(client, "other.example") == 403


def test_a_rebound_page_is_refused_by_its_host(client: TestClient) -> None:
    """DNS rebinding: to the browser this is the server's own page."""
    assert status(client, "evil.example", "http://evil.example") == 403
    assert status(client, "evil.example:8000", "http://evil.example:8000") == 403


def test_two_hosts_are_none(client: TestClient) -> None:
    headers = [("Host", "127.0.0.1"), ("Host", "127.0.0.1")]
    assert client.get("/v1/models", headers=headers).status_code == 403


def test_settings_name_more_hosts_and_origins(make_app: Callable[..., FastAPI]) -> None:
    page = "https://app.example"
    with TestClient(make_app(settings={"allowed_hosts": "*", "allowed_origins": page})) as client:
        assert status(client, "anything.example", page) == 200
        assert status(client, "anything.example", "https://evil.example") == 403
    for wrong in ("http://a.example", "a.example:80", "a/b", "-"):
        with pytest.raises(ValidationError, match="allowed_hosts"):
            Settings(allowed_hosts=wrong)  # type: ignore[arg-type]


def test_with_keys_hosts_are_held_only_where_they_are_named(make_app: Callable[..., FastAPI]) -> None:
    key: dict[str, Any] = {"headers": {"Authorization": "Bearer secret", "Host": "evil.example"}}
    with TestClient(make_app(settings={"api_keys": "secret"})) as client:
        assert client.get("/v1/models", **key).status_code == 200
    with TestClient(make_app(settings={"api_keys": "secret", "allowed_hosts": "api.example"})) as client:
        response = client.get("/v1/models", **key)
        assert response.status_code == 403
        assert "has no keys" not in response.text


def test_a_public_bind_without_keys_is_warned_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def serve(*_: object) -> None: ...

    monkeypatch.setattr("server.cli.serve._serve", serve)
    monkeypatch.setattr("server.cli.serve.configure", lambda *_: None)
    caplog.set_level(logging.WARNING)
    assert main(["serve", "--engine", "fake", "--host", "0.0.0.0", "--port", "0", "--allow-public-bind"]) == 0
    assert "Without keys on 0.0.0.0" in caplog.text
    caplog.clear()
    assert main(["serve", "--engine", "fake", "--port", "0"]) == 0
    assert not caplog.text


def test_the_image_binds_nothing_public_by_itself() -> None:
    (command,) = [line for line in Path("Dockerfile").read_text().splitlines() if line.startswith("CMD [")]
    assert "--allow-public-bind" not in command
