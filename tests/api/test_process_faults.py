"""Faults of the whole process: signals in mid-stream, a log that cannot be written, a loop that dies under load."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from filelock import FileLock
from starlette.testclient import TestClient

from tests.api.conftest import eventually, serving
from tests.deploy.conftest import SERVE, free_ports

LONG = {"model": "tiny", "prompt": "hi", "max_tokens": 200, "ignore_eos": True, "stream": True}


@pytest.fixture
def serve(model_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    """A real `recontrol serve` of the tiny model on a port; killed at the end if it still runs."""
    (tmp_path / "heads").mkdir()

    @contextlib.contextmanager
    def start(port: int, *words: str, stderr: Any = subprocess.DEVNULL) -> Iterator[subprocess.Popen[bytes]]:
        options = ["--model", str(model_folder()), "--served-model-name", "tiny", "--dtype", "float32"]
        options += ["--heads-dir", str(tmp_path / "heads"), "--port", str(port)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "RECONTROL_CACHE_DIR": str(tmp_path / "cache")}
        process = subprocess.Popen([*SERVE, *options, *words], stderr=stderr, env=env)
        try:
            assert eventually(lambda: is_ready(port) or process.poll() is not None, within_s=120)
            assert process.poll() is None
            yield process
        finally:
            process.kill()
            process.wait()

    return start


def is_ready(port: int) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url(port, "/ready"), timeout=60).status_code == 200
    return False


def url(port: int, path: str) -> str:
    return f"http://127.0.0.1:{port}{path}"


def complete(port: int, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "prompt": "hi", "max_tokens": 3, **fields}
    return httpx.post(url(port, "/v1/completions"), json=body, timeout=60)


def test_sigterm_in_mid_stream_ends_the_stream_with_an_error_and_done_and_the_process_cleanly(
    serve: Callable[..., Any],
) -> None:
    (port,) = free_ports(1)
    with serve(port, "--shutdown-grace-s", "0") as process:
        with httpx.stream("POST", url(port, "/v1/completions"), json={**LONG, "n": 8}, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "engine_stopped"
        assert process.wait(60) in (0, -signal.SIGTERM)


def test_sigkill_in_mid_stream_breaks_the_stream_and_the_next_server_takes_the_port(serve: Callable[..., Any]) -> None:
    (port,) = free_ports(1)
    with serve(port) as process:
        with httpx.stream("POST", url(port, "/v1/completions"), json={**LONG, "n": 8}, timeout=60) as response:
            lines = response.iter_lines()
            events = [next(lines)]
            process.kill()
            with pytest.raises(httpx.TransportError):
                events.extend(lines)
        assert "data: [DONE]" not in events
        assert process.wait(60) == -signal.SIGKILL
    with serve(port):
        assert complete(port).status_code == 200


def test_a_lock_of_a_killed_process_stands_in_nobodys_way(tmp_path: Path) -> None:
    """The conversion of a model is locked by a file that the kernel lets go of, and not by the file's being there."""
    path = tmp_path / "model.lock"
    hold = "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
    command = [sys.executable, "-c", hold + "print(1, flush=True); time.sleep(60)", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"1\n"
        try:
            with pytest.raises(TimeoutError):
                FileLock(path).acquire(timeout=0.05)
        finally:
            holder.kill()
    with FileLock(path).acquire(timeout=10):
        assert path.exists()


def test_a_full_disk_for_the_log_stops_nothing(serve: Callable[..., Any]) -> None:
    """Neither the start, where a progress bar once hung in its own end, nor requests, nor the end."""
    (port,) = free_ports(1)
    with open("/dev/full", "wb") as full, serve(port, "--log-format", "json", stderr=full) as process:
        assert [complete(port).status_code for _ in range(20)] == [200] * 20
        assert complete(port, temperature=9).status_code == 400
        assert httpx.get(url(port, "/health")).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM)


def num_there(app: FastAPI) -> int:
    status = app.state.engine.status()
    return status.num_running + status.num_waiting


async def test_a_loop_that_dies_under_load_tells_every_request_once_and_turns_health_to_503(
    make_embedded_app: Callable[..., FastAPI], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that run and rows that wait, streamed and whole; served on a socket, as clients see it."""
    app = make_embedded_app(max_waiting=64)

    async def ask(client: httpx.AsyncClient, number: int) -> tuple[int, str]:
        body = {**LONG, "max_tokens": 240, "stream": number % 2 == 0, "n": 2}
        response = await client.post("/v1/completions", json=body)
        return response.status_code, response.text

    def die() -> None:
        raise SystemExit

    with serving(app) as base:
        async with httpx.AsyncClient(base_url=base, timeout=60) as client:
            asked = [asyncio.create_task(ask(client, number)) for number in range(12)]
            deadline_s = time.monotonic() + 30
            while num_there(app) < 2 * len(asked) and time.monotonic() < deadline_s:
                await asyncio.sleep(0.005)
            monkeypatch.setattr(app.state.engine._core, "step", die)
            answers = await asyncio.wait_for(asyncio.gather(*asked), 30)
            for number, (status, text) in enumerate(answers):
                assert text.count("The request failed inside the engine.") == 1
                if number % 2:
                    assert (status, json.loads(text)["error"]["code"]) == (500, "generation_failed")
                else:
                    assert (status, text.count("[DONE]")) == (200, 1)
                    assert text.endswith("data: [DONE]\n\n")
            assert (await client.get("/health")).status_code == 503
            refused = await client.post("/v1/completions", json={**LONG, "stream": False})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_stopped")


def test_an_engine_short_of_memory_answers_500_and_serves_the_next_request(
    make_embedded_app: Callable[..., FastAPI], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_embedded_app()

    def short(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB at 0x7f00deadbeef")

    with TestClient(app) as client:
        with monkeypatch.context() as patch:
            patch.setattr(app.state.engine._core.runner, "forward", short)
            whole = client.post("/v1/completions", json={**LONG, "stream": False})
            streamed = client.post("/v1/completions", json=LONG).text.split("\n\n")
        assert (whole.status_code, whole.json()["error"]["code"]) == (500, "generation_failed")
        assert json.loads(streamed[0].removeprefix("data: "))["error"]["code"] == "generation_failed"
        assert streamed[1:] == ["data: [DONE]", ""]
        assert "GiB" not in whole.text + streamed[0]
        assert client.post("/v1/completions", json={**LONG, "stream": False}).status_code == 200
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_a_tokenizer_that_fails_on_a_prompt_ends_that_request_alone(
    make_embedded_app: Callable[..., FastAPI], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    app = make_embedded_app()
    bodies = {
        "/v1/completions": {"model": "tiny", "prompt": "hi", "max_tokens": 2},
        "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
        "/tokenize": {"prompt": "hi"},
    }
    with TestClient(app, raise_server_exceptions=False) as client:
        loaded = app.state.engine._loaded
        with monkeypatch.context() as patch:
            patch.setattr(type(loaded.tokenizer), "_encode_plus", lambda *_, **__: 1 / 0)
            response = client.post(path, json=bodies[path])
        assert response.status_code in (400, 500)
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert "ZeroDivision" not in response.text
        assert client.post(path, json=bodies[path]).status_code == 200
