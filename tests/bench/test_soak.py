"""The soak: its plan, its judgement of answers, and the whole of it against a real server with a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from server.bench.soak import judge
from server.bench.soak.bad_input import MAX_BODY_BYTES, Refused, bad_input
from server.bench.soak.client import Seen
from server.bench.soak.plan import Planned, World, make_plan
from tests.api.conftest import make_app  # noqa: F401

KEY = "soak-0123456789"
KINDS = bad_input("fake", 4096)


@pytest.fixture
def client(make_app: Callable[..., FastAPI]) -> Any:  # noqa: F811
    with TestClient(make_app(settings={"api_keys": KEY, "max_body_bytes": MAX_BODY_BYTES})) as client:
        yield client


def test_every_kind_of_bad_input_gets_its_status_and_names_its_field(client: TestClient) -> None:
    wrong = [problem for refused in KINDS for problem in judge.problems_of(*asked(client, refused))]
    assert wrong == []
    assert len({refused.name for refused in KINDS}) == len(KINDS) > 100


def asked(client: TestClient, refused: Refused) -> tuple[Planned, Seen]:
    key = {"authorization": f"Bearer {KEY}"} if refused.has_key else {}
    response = client.request(
        refused.method, refused.path, content=refused.content, headers={**key, **refused.headers}
    )
    seen = Seen(response.status_code, dict(response.headers), response.text)
    return Planned(0, refused.path, fault="bad input", refused=refused), seen
