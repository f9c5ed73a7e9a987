"""Servers that count the rates of a key together, in a real Redis."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient

from server.api.gate import shared_rates
from server.api.gate.limits import LocalBucket
from server.api.gate.shared_rates import SharedRates
from server.app import create_app
from server.engines.fake import FakeEngine
from server.settings import Settings
from tests.api.conftest import complete
from tests.deploy.conftest import require, running, wait_until

pytestmark = pytest.mark.deploy


@contextlib.contextmanager
def redis_at(path: Path) -> Iterator[None]:
    """A Redis that keeps nothing on disk, on a socket at `path`."""
    command = [require("redis-server", "Debian package redis-server"), "--port", "0", "--unixsocket", str(path)]
    with running([*command, "--save", "", "--loglevel", "warning"]):
        wait_until(path.exists, "Redis listens")
        yield
    path.unlink()


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    with redis_at(tmp_path / "redis.sock"):
        yield f"unix://{tmp_path}/redis.sock"


@contextlib.contextmanager
def replicas(url: str, **limits: int) -> Iterator[list[TestClient]]:
    """Clients of two servers with the same limits, on the fake engine."""
    settings = Settings(rate_limit_storage=SecretStr(url), **limits)  # type: ignore[arg-type]
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(TestClient(create_app(settings, FakeEngine()))) for _ in range(2)]


def test_replicas_count_the_requests_of_a_key_together(url: str) -> None:
    with replicas(url, requests_per_minute=4) as (one, other):
        assert [complete(client).status_code for client in (one, other, other, one)] == [200] * 4
        for client in (one, other):
            refused = complete(client)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            assert 1 <= int(refused.headers["retry-after"]) <= 15


def test_replicas_count_tokens_together_and_give_back_what_was_not_used(url: str) -> None:
    with replicas(url, tokens_per_minute=70) as (one, other):
        text = complete(one, max_tokens=30, seed=1).json()["choices"][0]["text"]
        stopped = {"max_tokens": 20, "seed": 1, "stop": text[0]}
        # 35 of 70 are used; each of these must be able to pay for 25, but uses 6.
        statuses = []
        for client in (other, one, other):
            statuses.append(complete(client, **stopped).status_code)
            time.sleep(0.1)  # what is put back is put back soon
        assert statuses == [200, 200, 429]
        assert complete(one, max_tokens=70).status_code == 400


async def test_a_shared_bucket_is_the_same_bucket_as_a_local_one(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        shared_rates, "_TAKE", shared_rates._TAKE.replace("call('TIME')", "call('LRANGE', 'now', 0, 1)")
    )
    rates, random_, now_s = SharedRates(url), random.Random(0), 1_000_000.0
    shared, local = rates.bucket("k", 1000), LocalBucket(1000, lambda: now_s)
    for _ in range(100):
        now_s += random_.randrange(20)
        await rates._redis.delete("now")
        await rates._redis.rpush("now", int(now_s), 0)
        amount = random_.randrange(1, 600)
        here, there = await local.take(amount), await shared.take(amount)
        assert there.wait_s == pytest.approx(here.wait_s)
        if not here.wait_s:
            for taken in (here, there):
                taken.put_back(amount // 3)
            await asyncio.gather(*rates._putting_back)
    await rates.close()


def test_servers_count_alone_while_redis_is_away_and_together_when_it_is_back(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(shared_rates, "_PAUSE_S", 0.05)
    path = tmp_path / "redis.sock"
    with contextlib.ExitStack() as stack:
        with redis_at(path):
            one, other = stack.enter_context(replicas(f"unix://{path}", requests_per_minute=2))
            assert [complete(client).status_code for client in (one, other, one)] == [200, 200, 429]
        assert [complete(one).status_code for _ in range(3)] == [200, 200, 429]
        with redis_at(path):
            time.sleep(0.1)
            assert [complete(client).status_code for client in (one, other, one)] == [200, 200, 429]
    assert "counts alone" in caplog.text
    assert "Redis can be used again" in caplog.text
