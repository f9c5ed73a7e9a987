"""States, and log-probabilities of prompts, are for those who may have the heads, which can be read from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from server.errors import ConfigurationError
from server.settings import Settings
from tests.api.conftest import complete

CALLER, INSPECTOR, MANAGER = "Caller-0123456789", "Inspector-0123456789", "Manager-0123456789"
KEYS = {"api_keys": CALLER, "inspect_keys": INSPECTOR}
STATE = {"model": "fake", "input": "a text", "hidden_state": "last"}
ECHO = {"model": "fake", "prompt": "a text", "max_tokens": 0, "echo": True, "logprobs": 1}


def asked(client: TestClient, key: str | None = None) -> list[tuple[int, str | None]]:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    answers = [client.post(path, json=body, headers=headers) for path, body in
               (("/v1/value", STATE), ("/v1/completions", ECHO))]  # fmt: skip
    return [(a.status_code, a.json()["error"]["param"] if a.is_error else None) for a in answers]


REFUSED = [(403, "hidden_state"), (403, "echo")]
SERVED = [(200, None), (200, None)]


def test_a_key_needs_a_right_of_its_own(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(settings=KEYS)) as client:
        assert asked(client, CALLER) == REFUSED
        assert asked(client, INSPECTOR) == SERVED
        assert [status for status, _ in asked(client)] == [401, 401]
        headers = {"Authorization": f"Bearer {CALLER}"}
        for body in ({**ECHO, "logprobs": None}, {**ECHO, "echo": False, "max_tokens": 2}):
            assert client.post("/v1/completions", json=body, headers=headers).status_code == 200
        values = client.post("/v1/value", json={**STATE, "hidden_state": None}, headers=headers)
        assert values.status_code == 200


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, SERVED),
        ({"host": "localhost"}, SERVED),
        ({"host": "0.0.0.0", "allow_public_bind": True}, REFUSED),
        ({"host": "0.0.0.0", "allow_public_bind": True, "allow_inspection": True}, SERVED),
    ],
)
def test_without_keys_only_this_machine_has_the_right(
    make_app: Callable[..., FastAPI], settings: dict[str, Any], expected: list[tuple[int, str | None]]
) -> None:
    with TestClient(make_app(settings=settings)) as client:
        assert asked(client) == expected


def test_keys_that_may_inspect_open_the_server_alone_too(make_app: Callable[..., FastAPI]) -> None:
    assert Settings(host="0.0.0.0", inspect_keys=INSPECTOR).inspect_keys is not None
    with TestClient(make_app(settings={"inspect_keys": INSPECTOR})) as client:
        assert complete(client).status_code == 401
        assert asked(client, INSPECTOR) == SERVED
    with pytest.raises(ConfigurationError, match="management_keys"):
        make_app(settings={"inspect_keys": MANAGER, "management_keys": MANAGER})
