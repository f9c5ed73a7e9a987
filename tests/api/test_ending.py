"""Deadlines, and an end that lets what runs finish."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import httpx
import openai
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from tests.api.conftest import complete, eventually, serving

LONG = {"model": "fake", "prompt": "hi", "max_tokens": 4000}


@pytest.mark.parametrize("settings", [{}, {"request_timeout_s": 0.2}])
def test_a_response_that_takes_too_long_is_a_504_and_frees_its_slots(
    make_app: Callable[..., FastAPI], settings: dict[str, float]
) -> None:
    app = make_app(settings=settings, token_delay_s=0.02)
    deadline = {} if settings else {"timeout_s": 0.2}
    with TestClient(app) as client:
        started_s = time.monotonic()
        response = complete(client, prompt=["a", "b"], max_tokens=4000, **deadline)
        assert time.monotonic() - started_s < 5
        assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert "0.2 s" in response.json()["error"]["message"]
        assert response.json()["error"]["type"] == "server_error"
        assert app.state.engine.num_open == 0
        assert complete(client, max_tokens=1, timeout_s=60).status_code == 200


def test_a_stream_that_takes_too_long_ends_with_an_error_event_and_done(make_app: Callable[..., FastAPI]) -> None:
    app = make_app(token_delay_s=0.02)
    with TestClient(app) as client:
        events = complete(client, max_tokens=4000, stream=True, timeout_s=0.2).text.split("\n\n")
        assert len(events) > 3
        assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
        assert events[-2:] == ["data: [DONE]", ""]
        assert app.state.engine.num_open == 0


def test_a_callers_deadline_cannot_be_later_than_the_servers(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(settings={"request_timeout_s": 0.1}, token_delay_s=0.02)) as client:
        assert "0.1 s" in complete(client, max_tokens=4000, timeout_s=60).json()["error"]["message"]


def test_the_openai_sdk_does_not_repeat_what_was_too_slow(make_app: Callable[..., FastAPI]) -> None:
    app = make_app(token_delay_s=0.02)
    with serving(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=5) as sdk:
        started_s = time.monotonic()
        with pytest.raises(openai.InternalServerError, match="not complete"):
            sdk.completions.create(model="fake", prompt="hi", max_tokens=4000, extra_body={"timeout_s": 0.2})
        assert time.monotonic() - started_s < 3


class Ending:
    """A server that is told to stop while a stream of `num_tokens` runs."""

    def __init__(self, app: FastAPI, *, grace_s: float, num_tokens: int) -> None:
        self.events: list[str] = []
        self.ready_codes: set[int] = set()
        with serving(app, grace_s=grace_s) as url, httpx.Client(base_url=url) as client:
            body = {**LONG, "max_tokens": num_tokens, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                assert client.get("/ready").status_code == 200
                app.state.tell_to_stop()
                assert eventually(lambda: client.get("/ready").status_code == 503)
                assert client.get("/health").status_code == 200
                self.refused = client.post("/v1/completions", json=LONG)
                self.events = [line for line in lines if line]


def test_what_runs_finishes_within_the_grace_period_while_nothing_new_begins(make_app: Callable[..., FastAPI]) -> None:
    ending = Ending(make_app(token_delay_s=0.02), grace_s=30, num_tokens=60)
    assert (ending.refused.status_code, ending.refused.json()["error"]["code"]) == (503, "shutting_down")
    assert int(ending.refused.headers["retry-after"]) >= 1
    assert ending.events[-1] == "data: [DONE]"
    assert json.loads(ending.events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


def test_after_the_grace_period_the_rest_ends_with_an_error_event(make_app: Callable[..., FastAPI]) -> None:
    ending = Ending(make_app(token_delay_s=0.02), grace_s=0.4, num_tokens=4000)
    assert json.loads(ending.events[-2].removeprefix("data: "))["error"]["code"] == "engine_stopped"
    assert ending.events[-1] == "data: [DONE]"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_ends_the_server_cleanly_and_at_once_when_nothing_runs(number: signal.Signals, status: int) -> None:
    main = "import sys; from server.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", main, "serve", "--engine", "fake", "--port", "0", "--log-format", "json"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as run:
        assert run.stderr is not None
        logged: list[str] = []
        for line in run.stderr:
            logged.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        assert found
        assert httpx.get(f"{found[0]}/ready").status_code == 200
        told_s = time.monotonic()
        run.send_signal(number)
        logged += run.stderr.read().splitlines()
        assert (run.wait(10), time.monotonic() - told_s < 1) == (status, True)
    assert all(isinstance(json.loads(line), dict) for line in logged)
    assert any(json.loads(line).get("path") == "/ready" for line in logged)


def test_a_loop_that_has_died_turns_health_and_ready_to_503(
    make_embedded_app: Callable[..., FastAPI], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_embedded_app()

    def die() -> None:
        raise SystemExit

    with TestClient(app) as client:
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
        monkeypatch.setattr(app.state.engine._core, "step", die)
        assert complete(client, model="tiny").status_code == 500
        assert eventually(lambda: client.get("/health").status_code == 503)
        assert client.get("/ready").status_code == 503
        assert complete(client, model="tiny").status_code == 503
        assert client.get("/metrics").status_code == 200


STARTING = """
import asyncio, time
from server.cli import main
from server.engines.fake import FakeEngine

async def start(self):
    print("starting", flush=True)
    await asyncio.to_thread(time.sleep, 60)

FakeEngine.start = start
main(["serve", "--engine", "fake", "--port", "0"])
"""
LOADING = """
import time
from server.cli import main
from server.cli.command import ModelCommand

def load(self):
    print("loading", flush=True)
    time.sleep(60)

ModelCommand.load = load
main(["generate", "hi"])
"""
IMPORTING = """
import sys, time
from server.cli import main

class Slow:
    def find_spec(self, name, *_):
        if name == "server.engines.embedded":
            print("importing", flush=True)
            time.sleep(60)

sys.meta_path.insert(0, Slow())
main(["generate", "hi"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("code", [STARTING, LOADING, IMPORTING])
def test_a_signal_ends_a_command_at_once_and_in_silence_whatever_it_does(code: str, number: signal.Signals) -> None:
    """By a handler and not by the default, which the first process of a container does not have."""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        assert run.stdout.readline().endswith("ing\n")
        told_s = time.monotonic()
        run.send_signal(number)
        assert (run.wait(10), time.monotonic() - told_s < 1) == (128 + number, True)
        assert run.stderr.read() == ""


def test_nothing_that_takes_long_is_imported_before_signals_are_handled() -> None:
    code = "import sys; before = set(sys.modules); import server.cli; print(*(set(sys.modules) - before))"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {name.partition(".")[0] for name in imported} <= {"server", *sys.stdlib_module_names}
