"""Two real servers on heads in one bucket, over the protocol of S3."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from server.settings import DEFAULT_MODEL
from tests.deploy.conftest import ROOT, SERVE, free_ports, require_module, running, wait_until, wait_until_up

pytestmark = [pytest.mark.deploy, pytest.mark.slow]
HEADS = "s3://my-bucket/heads"


@pytest.fixture(scope="module")
def store() -> Iterator[dict[str, str]]:
    """The environment of whoever uses a store that speaks S3."""
    require_module("moto", "moto[server]")
    require_module("s3fs", "s3fs")
    (port,) = free_ports(1)
    endpoint = f"http://127.0.0.1:{port}"
    with running([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]) as process:
        wait_until_up(process, f"{endpoint}/moto-api/data.json")
        assert httpx.put(f"{endpoint}/my-bucket").status_code == 200
        yield {
            "FSSPEC_S3_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }


def publish(name: str, store: dict[str, str]) -> None:
    command = [*SERVE[:-1], "heads", "publish", name, "--to", HEADS]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **store}, check=True, timeout=100)


def test_servers_follow_the_heads_of_one_bucket_without_a_restart(store: dict[str, str]) -> None:
    publish("plain", store)
    urls = [f"http://127.0.0.1:{port}" for port in free_ports(2)]
    polling = [*SERVE, "--heads-dir", HEADS, "--heads-poll-s", "1", "--log-level", "warning", "--port"]
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(running([*polling, url.rpartition(":")[2]], env=store)) for url in urls]
        for server, url in zip(servers, urls, strict=True):
            wait_until_up(server, f"{url}/ready")

        def values(url: str) -> dict[str, float]:
            body = {"model": DEFAULT_MODEL, "input": "What a lovely day"}
            return httpx.post(f"{url}/v1/value", json=body).json()["data"][0]["values"]

        assert [set(values(url)) for url in urls] == [{"plain"}] * 2
        publish("positive", store)
        wait_until(lambda: all(len(values(url)) == 2 for url in urls), "both servers have the new head")
        assert values(urls[0]) == values(urls[1])
