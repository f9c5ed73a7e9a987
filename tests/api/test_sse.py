"""Events as bytes, what a proxy is told of them, comments while nothing comes, and readers that do not read."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from starlette.types import Message

from server.api import running
from server.api.sse import EventStream, _event
from server.cli.serve import _connection_limits
from server.settings import Settings
from tests.api.conftest import chat, complete, eventually, serving

UNREAD = {"model": "fake", "prompt": "hi", "max_tokens": 1000, "n": 16, "logprobs": 20, "stream": True}


def test_an_event_is_one_line_for_whoever_cuts_lines_as_python_does() -> None:
    """httpx does, and so do clients that are built on it; a model draws such characters now and then."""
    data = {"text": "".join(map(chr, [*range(0x20), 0x7F, 0x85, 0xA0, 0x2028, 0x2029, 0x1F600]))}
    line, empty = _event(data, is_named=False).decode().splitlines()
    assert not empty
    assert json.loads(line.removeprefix("data: ")) == data


@pytest.mark.parametrize("ask", [complete, chat])
def test_a_stream_tells_proxies_to_pass_it_on_at_once_and_caches_to_keep_nothing(
    client: TestClient, ask: Callable[..., httpx.Response]
) -> None:
    headers = ask(client, stream=True).headers
    assert headers["content-type"].startswith("text/event-stream")
    assert (headers["x-accel-buffering"], headers["cache-control"]) == ("no", "no-cache")


@pytest.mark.parametrize("ask", [complete, chat])
def test_comments_go_out_while_no_token_comes_and_change_no_event(
    make_app: Callable[..., FastAPI], ask: Callable[..., httpx.Response]
) -> None:
    app = make_app(settings={"stream_ping_s": 0.05}, token_delay_s=0.3)
    with TestClient(app) as client:
        lines = ask(client, max_tokens=3, stream=True).text.split("\n\n")
        comments = [line for line in lines if line.startswith(":")]
        events = [line for line in lines if line.startswith("data: ")]
        assert lines[0] == ": ping"
        assert set(comments) == {": ping"}
        assert len(comments) >= 3
        assert [*comments, *events, ""] == sorted(lines, key=lambda line: (not line, line[:1] != ":"))
        assert lines[-2] == events[-1] == "data: [DONE]"
        whole = ask(client, max_tokens=3).json()["choices"][0]
        assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == whole["finish_reason"]


@pytest.mark.parametrize("stream_ping_s", [0, 30])
def test_there_are_no_comments_when_they_are_off_or_tokens_come_often_enough(
    make_app: Callable[..., FastAPI], stream_ping_s: float
) -> None:
    with TestClient(make_app(settings={"stream_ping_s": stream_ping_s}, token_delay_s=0.02)) as client:
        assert ":" not in {line[:1] for line in complete(client, max_tokens=5, stream=True).text.split("\n\n")}


def test_a_stream_that_ends_in_an_error_has_no_comment_behind_its_end(make_app: Callable[..., FastAPI]) -> None:
    app = make_app(settings={"stream_ping_s": 0.02, "request_timeout_s": 0.3}, token_delay_s=0.1)
    with TestClient(app) as client:
        lines = complete(client, max_tokens=100, stream=True).text.split("\n\n")
        assert ": ping" in lines
        assert "deadline_exceeded" in lines[-3]
        assert lines[-2:] == ["data: [DONE]", ""]


async def test_nothing_follows_the_last_event_however_long_its_generation_takes_to_close() -> None:
    async def events() -> AsyncGenerator[dict[str, Any], None]:
        try:
            yield {}
        finally:
            await asyncio.sleep(0.1)

    async def nothing() -> None:
        await asyncio.sleep(0.1)

    sent: list[bytes] = []

    async def send(message: Message) -> None:
        sent.append(message.get("body", b"start"))
        await asyncio.sleep(0.05)  # nor while it is being sent

    stream = EventStream(events(), on_end=nothing, request_id="r", ping_s=0.02)
    await stream.stream_response(send)
    assert sent == [b"start", b"data: {}\n\n", *[b": ping\n\n"] * (len(sent) - 4), b"data: [DONE]\n\n", b""]
    assert len(sent) > 4


def test_the_openai_sdk_does_not_see_the_comments(make_app: Callable[..., FastAPI]) -> None:
    app = make_app(settings={"stream_ping_s": 0.02}, token_delay_s=0.1)
    with serving(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as sdk:
        stream = sdk.completions.create(model="fake", prompt="hi", max_tokens=3, seed=1, stream=True)
        whole = sdk.completions.create(model="fake", prompt="hi", max_tokens=3, seed=1)
        assert "".join(event.choices[0].text for event in stream) == whole.choices[0].text


def test_a_client_that_leaves_between_two_comments_frees_its_slot(make_app: Callable[..., FastAPI]) -> None:
    app = make_app(settings={"stream_ping_s": 0.02}, token_delay_s=60)
    body = {"model": "fake", "prompt": "hi", "stream": True}
    with serving(app) as url, httpx.Client() as client:
        with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            lines = response.iter_lines()  # kept: httpx hangs up when the iterator is dropped
            assert next(lines) == ": ping"
            assert app.state.engine.num_open == 1
        assert eventually(lambda: app.state.engine.num_open == 0)


def connected(url: str, body: dict[str, object]) -> socket.socket:
    """A connection that has asked and reads nothing, with little room for what comes."""
    address = urlsplit(url)
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
    one.connect((address.hostname, address.port))
    text = json.dumps(body)
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    one.sendall(f"{head}content-length: {len(text)}\r\n\r\n{text}".encode())
    return one


def test_a_stream_that_nobody_reads_ends_and_frees_its_callers_place(make_app: Callable[..., FastAPI]) -> None:
    app = make_app(settings={"concurrent_requests": 1})
    with serving(app, send_timeout_s=2.0, send_buffer_bytes=2**14) as url, connected(url, {**UNREAD, "n": 1}):
        short = {"model": "fake", "prompt": "hi", "max_tokens": 1}
        assert eventually(lambda: httpx.post(f"{url}/v1/completions", json=short).status_code == 429)
        assert eventually(lambda: httpx.post(f"{url}/v1/completions", json=short).status_code == 200, within_s=20)
        assert app.state.engine.num_open == 0


@pytest.mark.parametrize(("request_timeout_s", "right_s"), [(None, 60), (8, 8), (900, 60)])
def test_a_client_that_does_not_read_gets_no_longer_than_a_response_may_take(
    request_timeout_s: float | None, right_s: float
) -> None:
    assert _connection_limits(Settings(request_timeout_s=request_timeout_s)).send_timeout_s == right_s


def test_a_stream_that_is_read_slowly_goes_on_to_its_end(
    make_app: Callable[..., FastAPI], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The engine that needs no model is faster than any client.
    monkeypatch.setattr(running, "_MAX_UNREAD", 10**6)
    with serving(make_app(), send_timeout_s=0.3) as url, connected(url, UNREAD) as reader:
        read = bytearray()
        time.sleep(0.2)
        while not read.endswith(b"0\r\n\r\n") and (part := reader.recv(2**16)):
            read += part
            time.sleep(0.02)
        assert b"data: [DONE]\n\n" in read[-40:]
        assert b'"error"' not in read[-2000:]
