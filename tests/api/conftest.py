"""Clients of an app over the fake engine, in process and over a real socket."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from server.app import create_app
from server.cli.address import bind, port_of
from server.cli.connection import ConnectionLimits
from server.cli.http import DrainingServer
from server.engines.embedded.engine import EmbeddedEngine
from server.engines.fake import FakeEngine
from server.settings import Settings
from server.telemetry import Telemetry
from server.types import GenerationRequest
from tests.conftest import write_heads
from value_models.heads import ValueHead


@pytest.fixture
def make_app() -> Callable[..., FastAPI]:
    def make(*, settings: dict[str, Any] | None = None, **options: Any) -> FastAPI:
        """`settings` are the server's, `options` the fake engine's."""
        resolved = Settings(**{"max_body_bytes": 100_000, **(settings or {})})
        telemetry = Telemetry(vllm_names=resolved.vllm_metrics)
        return create_app(resolved, FakeEngine(observer=telemetry, **options), telemetry)

    return make


@pytest.fixture
def make_embedded_app(
    model_folder: Callable[..., Path], load_tiny: Callable[..., Any], heads: dict[str, ValueHead], tmp_path: Path
) -> Callable[..., FastAPI]:
    """The app over a tiny random model, whose heads lie in `tmp_path / "heads"`."""
    write_heads(tmp_path / "heads", {"positive": heads["good"], "plain": heads["line"]}, load_tiny().identity)

    def make(**settings: Any) -> FastAPI:
        resolved = Settings(
            model=str(model_folder()), served_model_name="tiny", heads_dir=tmp_path / "heads", device="cpu",
            dtype="float32", max_batch_size=4, **settings,
        )  # fmt: skip
        telemetry = Telemetry()
        return create_app(resolved, EmbeddedEngine(resolved, observer=telemetry), telemetry)

    return make


@pytest.fixture
def client(make_app: Callable[..., FastAPI]) -> Iterator[TestClient]:
    with TestClient(make_app()) as client:
        yield client


@contextlib.contextmanager
def recording(app: FastAPI) -> Iterator[tuple[TestClient, list[GenerationRequest]]]:
    """A client of the app, and the requests that have come to its engine."""
    requests: list[GenerationRequest] = []
    generate = app.state.engine.generate

    def record(request: GenerationRequest) -> Any:
        requests.append(request)
        return generate(request)

    app.state.engine.generate = record
    with TestClient(app) as client:
        yield client, requests


@contextlib.contextmanager
def serving(
    app: FastAPI, *, grace_s: float = 0.5, send_buffer_bytes: int | None = None, **limits: Any
) -> Iterator[str]:
    """The app on a free port of this machine, with ConnectionLimits of these; its base URL.

    The kernel takes some megabytes of what nobody reads, unless `send_buffer_bytes` says otherwise.
    """
    server = DrainingServer(app, ConnectionLimits(**limits), grace_s=grace_s, log_level="warning")
    sockets = bind("127.0.0.1", 0)
    if send_buffer_bytes is not None:
        # Connections have it from the socket that takes them.
        sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    app.state.tell_to_stop = lambda: setattr(server, "should_exit", True)
    thread = threading.Thread(target=server.run, args=(sockets,))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port_of(sockets)}"
    finally:
        server.should_exit = True
        thread.join()


def eventually(condition: Callable[[], bool], *, within_s: float = 5.0) -> bool:
    """Whether the condition comes true in time."""
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        if condition():
            return True
        time.sleep(0.01)
    return condition()


def complete(client: TestClient, **body: Any) -> httpx.Response:
    return client.post("/v1/completions", json={"model": "fake", "prompt": "hello", **body})


def chat(client: TestClient, **body: Any) -> httpx.Response:
    messages = [{"role": "user", "content": "hello"}]
    return client.post("/v1/chat/completions", json={"model": "fake", "messages": messages, **body})


def respond(client: TestClient, **body: Any) -> httpx.Response:
    return client.post("/v1/responses", json={"model": "fake", "input": "hello", **body})
