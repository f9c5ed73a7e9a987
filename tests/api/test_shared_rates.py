"""Rates that servers are to share while there is no Redis; with one, see `tests/deploy/test_shared_rates.py`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import ValidationError
from starlette.testclient import TestClient

from server.cli import main
from server.errors import ConfigurationError
from server.settings import Settings
from tests.api.conftest import complete

NOBODY = "redis://:s3cret@127.0.0.1:9/0"


def test_without_redis_a_server_says_so_once_and_counts_alone(
    make_app: Callable[..., FastAPI], caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(settings={"requests_per_minute": 2, "tokens_per_minute": 100, "rate_limit_storage": NOBODY})
    with TestClient(app) as client:
        assert [complete(client, max_tokens=5).status_code for _ in range(3)] == [200, 200, 429]
        refused = complete(client)
        assert 1 <= int(refused.headers["retry-after"]) <= 30
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "this server counts alone" in warnings[0]
    assert "s3cret" not in caplog.text


def test_tokens_that_were_not_used_come_back_without_redis_too(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(settings={"tokens_per_minute": 70, "rate_limit_storage": NOBODY})) as client:
        text = complete(client, max_tokens=30, seed=1).json()["choices"][0]["text"]
        stopped = {"max_tokens": 20, "seed": 1, "stop": text[0]}
        assert [complete(client, **stopped).status_code for _ in range(3)] == [200, 200, 429]


@pytest.mark.parametrize(
    "url",
    ["", "s3cret", "http://:s3cret@host", "redis://:s3#cret@host", "redis://:s3cret@host:99999",
     "redis://:s3cret@host/db", "redis://:s3cret@host/0?nonsense=1", "redis://:s3cret@host?db=x",
     "rediss://:s3cret@host?ssl_cert_reqs=perhaps"],
)  # fmt: skip
def test_what_is_no_url_of_redis_is_refused_and_never_shown(make_app: Callable[..., FastAPI], url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^rate_limit_storage: not a URL of Redis; allowed are red") as caught:
        make_app(settings={"requests_per_minute": 2, "rate_limit_storage": url})
    assert "s3" not in str(caught.value)


def test_on_the_command_line_that_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    storage = ["--requests-per-minute", "2", "--rate-limit-storage", "http://:s3cret@host"]
    assert main(["serve", "--engine", "fake", *storage]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("recontrol serve: rate_limit_storage: ")


def test_a_storage_without_a_rate_is_refused_and_its_url_is_never_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValidationError, match="rate_limit_storage: set requests_per_minute or tokens_per_minute"):
        Settings(rate_limit_storage=NOBODY, concurrent_requests=1)  # type: ignore[arg-type]
    assert main(["serve", "--print-config", "--requests-per-minute", "2", "--rate-limit-storage", NOBODY]) == 0
    assert "s3cret" not in capsys.readouterr().out


def test_a_server_without_the_clients_library_says_which_extra_has_it(
    make_app: Callable[..., FastAPI], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "server.api.gate.shared_rates", raising=False)
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    settings: dict[str, Any] = {"requests_per_minute": 2, "rate_limit_storage": NOBODY}
    with pytest.raises(ConfigurationError, match=r"recontrol\[redis\]"):
        make_app(settings=settings)
