"""Pages of other origins, HEAD, and compressed bodies: what browsers and proxies do."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable

import httpx
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from server.api.playground import PATHS
from server.cli import main
from tests.api.conftest import complete

PAGE = "https://app.example"
BODY = {"model": "fake", "prompt": "hello"}


def preflight(client: TestClient, origin: str = PAGE, headers: str = "authorization,content-type") -> httpx.Response:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": headers}
    return client.options("/v1/chat/completions", headers={"Origin": origin, **asked})


def test_no_other_origin_is_allowed_by_default(client: TestClient) -> None:
    assert preflight(client).status_code == 403
    refused = client.get("/v1/models", headers={"Origin": PAGE})
    assert refused.status_code == 403
    assert "access-control-allow-origin" not in refused.headers


def test_a_page_of_an_allowed_origin_asks_first_without_a_key_and_then_with_one(
    make_app: Callable[..., FastAPI],
) -> None:
    app = make_app(settings={"allowed_origins": f"{PAGE}, http://localhost:3000", "api_keys": "secret"})
    with TestClient(app) as client:
        allowed = preflight(client, headers="authorization,content-type,x-stainless-lang")
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, PAGE)
        assert "x-stainless-lang" in allowed.headers["access-control-allow-headers"]
        assert preflight(client, "https://evil.example").status_code == 400
        key = {"Authorization": "Bearer secret", "Origin": PAGE}
        done = client.post("/v1/completions", json=BODY, headers=key)
        assert (done.status_code, done.headers["access-control-allow-origin"]) == (200, PAGE)
        assert "origin" in done.headers["vary"].lower()
        assert "access-control-allow-credentials" not in done.headers
        other = client.get("/v1/models", headers={**key, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


def test_a_page_may_read_errors_the_request_id_and_when_to_try_again(make_app: Callable[..., FastAPI]) -> None:
    app = make_app(settings={"allowed_origins": "*", "requests_per_minute": 1})
    with TestClient(app) as client:
        for status in (200, 429):
            done = client.post("/v1/completions", json=BODY, headers={"Origin": PAGE})
            assert (done.status_code, done.headers["access-control-allow-origin"]) == (status, "*")
            assert {"x-request-id", "Retry-After"} <= set(done.headers["access-control-expose-headers"].split(", "))


@pytest.mark.parametrize(
    "origins", ["app.example", "https://app.example/", "https://a b", "file://", "https://*.x.org"]
)
def test_what_no_browser_sends_is_no_origin(origins: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--print-config", "--allowed-origins", origins]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "serve: allowed_origins" in line
    assert "is no origin; allowed are" in line


def test_origins_are_named_alike_by_flag_variable_and_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECONTROL_ALLOWED_ORIGINS", "https://a.example,http://[::1]:3000")
    assert main(["serve", "--print-config"]) == 0
    assert json.loads(capsys.readouterr().out)["allowed_origins"] == ["https://a.example", "http://[::1]:3000"]
    assert main(["serve", "--print-config", "--allowed-origins", "*"]) == 0
    assert json.loads(capsys.readouterr().out)["allowed_origins"] == ["*"]


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/v1/heads", "/metrics", "/version", *sorted(PATHS)])
def test_head_is_get_without_the_body(client: TestClient, path: str) -> None:
    whole, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]
    assert "content-length" in head.headers


def test_head_of_what_is_missing_closed_or_has_no_get_fails_as_get_does(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(settings={"api_keys": "secret"})) as client:
        key = {"Authorization": "Bearer secret"}
        assert client.head("/v1/models").status_code == 401
        assert client.head("/nothing", headers=key).status_code == 404
        assert client.head("/v1/completions", headers=key).status_code == 405


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def send(client: TestClient, body: bytes, encoding: str) -> httpx.Response:
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    return client.post("/v1/completions", content=body, headers=headers)


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [
        ("gzip", gzip.compress),
        ("GZIP", gzip.compress),
        ("x-gzip", gzip.compress),
        ("deflate", zlib.compress),
        ("deflate", raw_deflate),
        ("identity", bytes),
    ],
)
def test_a_compressed_body_is_the_body(client: TestClient, encoding: str, pack: Callable[[bytes], bytes]) -> None:
    done = send(client, pack(json.dumps({**BODY, "seed": 1}).encode()), encoding)
    assert done.status_code == 200
    assert done.json()["choices"] == complete(client, seed=1).json()["choices"]


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "compress"])
def test_another_encoding_is_a_415_that_names_those_allowed(client: TestClient, encoding: str) -> None:
    refused = send(client, b"x", encoding)
    assert (refused.status_code, refused.headers["accept-encoding"]) == (415, "gzip, deflate")
    assert "gzip, deflate" in refused.json()["error"]["message"]


def test_a_body_that_grows_beyond_the_limit_is_a_413(client: TestClient) -> None:
    for bomb in (gzip.compress(bytes(10**8)), gzip.compress(b" " * 100_001)):
        refused = send(client, bomb, "gzip")
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")
    assert send(client, gzip.compress(json.dumps(BODY).encode().ljust(100_000)), "gzip").status_code == 200


@pytest.mark.parametrize("body", [b"{}", gzip.compress(b"{}")[:-3], gzip.compress(b"{}") + b"more"], ids=["plain", "cut", "longer"])
def test_what_is_not_in_its_encoding_is_a_400(client: TestClient, body: bytes) -> None:
    refused = send(client, body, "gzip")
    assert refused.status_code == 400
    assert "gzip" in refused.json()["error"]["message"]
