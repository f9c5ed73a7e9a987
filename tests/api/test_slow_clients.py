"""Clients that do not send, do not read or say nothing: none holds a place, or keeps the server from its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI

import server.app
from server.api import running
from server.api.gate.limits import LocalRates
from server.types import GenerationChunk
from tests.api.conftest import eventually, serving
from tests.api.test_sse import connected

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
UNREAD: dict[str, Any] = {"model": "fake", "prompt": "hi", "max_tokens": 500, "logprobs": 20, "stream": True}
SMALL = 2**14
SHORT = {"model": "fake", "prompt": "hi", "max_tokens": 1}


def sent(url: str, data: bytes) -> socket.socket:
    """A connection that has sent this and waits."""
    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname or "", parts.port or 0), timeout=10)
    connection.sendall(data)
    return connection


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server hangs up; raises TimeoutError where it does not."""
    with contextlib.closing(connection):
        return b"".join(iter(lambda: connection.recv(2**16), b""))


def test_a_body_that_does_not_come_is_a_408_and_takes_no_place_meanwhile(make_app: Callable[..., FastAPI]) -> None:
    settings = {"receive_timeout_s": 1.0, "concurrent_requests": 1, "requests_per_minute": 1}
    with serving(make_app(settings=settings)) as url:
        waiting = sent(url, HEAD + b"content-length: 100\r\n\r\n{")
        assert httpx.post(f"{url}/v1/completions", json=SHORT).status_code == 200
        answer = rest(waiting)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"connection: close" in answer.lower()
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"


def test_a_body_that_trickles_in_is_a_408_too(make_app: Callable[..., FastAPI]) -> None:
    with serving(make_app(settings={"receive_timeout_s": 0.5})) as url:
        connection = sent(url, HEAD + b"content-length: 1000\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(20):
                connection.sendall(b" ")
                time.sleep(0.1)
        assert rest(connection).startswith(b"HTTP/1.1 408")


def test_bodies_on_their_way_take_bounded_memory_together(make_app: Callable[..., FastAPI]) -> None:
    head = HEAD + b"content-length: 200000\r\n\r\n"
    with serving(make_app(settings={"max_body_bytes": 200_000, "receive_timeout_s": 30.0})) as url:
        waiting = [sent(url, head + b" " * 199_000) for _ in range(70)]
        answers = [answer for connection in waiting if (answer := _early(connection))]
        assert 4 <= len(answers) <= 8
        assert all(answer.startswith(b"HTTP/1.1 429") and b"\r\nretry-after: " in answer for answer in answers)
        assert httpx.post(f"{url}/v1/completions", json=SHORT).status_code == 200
        for connection in waiting:
            connection.close()
        large = {**SHORT, "prompt": "a" * 190_000}
        assert eventually(lambda: httpx.post(f"{url}/v1/completions", json=large).status_code == 400)


CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"


def test_a_body_in_chunks_of_a_byte_is_a_400_before_they_hold_up_others(make_app: Callable[..., FastAPI]) -> None:
    with serving(make_app()) as url:
        answer = rest(sent(url, CHUNKED + b"1\r\n \r\n" * 5000))
        assert answer.startswith(b"HTTP/1.1 400")
        assert b"in chunks of less than 64 bytes" in answer
        # Also where a body is only passed over.
        with contextlib.suppress(ConnectionError):
            unwanted = CHUNKED.replace(b"/v1/completions", b"/v1/none")
            assert b"200" not in rest(sent(url, unwanted + b"1\r\n \r\n" * 5000))


def test_a_body_that_is_refused_for_its_chunks_gets_no_second_answer(
    make_app: Callable[..., FastAPI], caplog: pytest.LogCaptureFixture
) -> None:
    """One of the app's own, to which it is too large as well."""
    large = b"ff00\r\n" + b" " * 0xFF00 + b"\r\n"
    with serving(make_app(settings={"max_body_bytes": 0xFF00})) as url:
        assert rest(sent(url, CHUNKED + large + b"1\r\n \r\n" * 5500)).count(b"HTTP/1.1 4") == 1
    assert not [record for record in caplog.records if record.exc_info]


def test_a_body_may_come_in_small_chunks_and_in_many_of_a_usual_size(make_app: Callable[..., FastAPI]) -> None:
    body = json.dumps(SHORT).encode()
    few = (b"%c" % byte for byte in body + b" " * 4000)
    many = (b" " * 64 for _ in range(6000))
    with serving(make_app(settings={"max_body_bytes": 2**20})) as url:
        for parts in (few, (part for some in ((body,), many) for part in some)):
            headers = {"content-type": "application/json"}
            assert httpx.post(f"{url}/v1/completions", content=parts, headers=headers).status_code == 200


def _early(connection: socket.socket) -> bytes:
    """What has come before the body is whole."""
    connection.settimeout(0.2)
    try:
        return connection.recv(2**16)
    except TimeoutError:
        return b""


@pytest.mark.parametrize(
    "data", [b"G", b"GET /health HTTP/1.1\r\nx-a: b\r\n", b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nG"]
)
def test_headers_that_never_end_are_a_408(make_app: Callable[..., FastAPI], data: bytes) -> None:
    with serving(make_app(), receive_timeout_s=0.3) as url:
        assert b"HTTP/1.1 408" in rest(sent(url, data))


def test_headers_that_trickle_in_get_no_more_time(make_app: Callable[..., FastAPI]) -> None:
    with serving(make_app(), receive_timeout_s=0.4) as url:
        connection, started_s = sent(url, b"GET /health HTTP/1.1\r\n"), time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < started_s + 3:
                connection.sendall(b"x-a: b\r\n")
                time.sleep(0.05)
        connection.close()
        assert time.monotonic() < started_s + 2


def test_a_body_that_was_refused_unread_does_not_hold_its_connection(make_app: Callable[..., FastAPI]) -> None:
    with serving(make_app(settings={"api_keys": "a-key"}), receive_timeout_s=0.3) as url:
        assert rest(sent(url, HEAD + b"content-length: 100\r\n\r\n")).startswith(b"HTTP/1.1 401")


def test_a_connection_that_says_nothing_is_closed_like_one_between_two_requests(
    make_app: Callable[..., FastAPI],
) -> None:
    with serving(make_app(), keep_alive_s=0.3) as url:
        assert rest(sent(url, b"")) == b""
        assert rest(sent(url, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")).startswith(b"HTTP/1.1 200")


def test_one_connection_too_many_takes_the_place_of_the_one_that_is_idle_for_longest(
    make_app: Callable[..., FastAPI],
) -> None:
    with serving(make_app(), max_connections=3) as url:
        idle = [sent(url, b"") for _ in range(3)]
        assert httpx.get(f"{url}/health").status_code == 200
        assert rest(idle[0]) == b""
        idle[2].sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        assert rest(idle[2]).startswith(b"HTTP/1.1 200")
        idle[1].close()


def test_where_all_connections_have_requests_another_one_is_refused(make_app: Callable[..., FastAPI]) -> None:
    app = make_app(token_delay_s=0.05)
    with serving(app, max_connections=1) as url, connected(url, UNREAD):
        assert eventually(lambda: app.state.engine.num_open == 1)
        answer = rest(sent(url, b""))
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"\r\nretry-after: 1\r\n" in answer


def test_a_client_that_takes_a_byte_now_and_then_does_not_read(make_app: Callable[..., FastAPI]) -> None:
    app = make_app(settings={"concurrent_requests": 1})
    with serving(app, send_timeout_s=0.5, send_buffer_bytes=SMALL) as url, connected(url, UNREAD) as reader:

        def free() -> bool:
            with contextlib.suppress(ConnectionError):
                reader.recv(1)
            return httpx.post(f"{url}/v1/completions", json=SHORT).status_code == 200

        assert eventually(lambda: not free())
        assert eventually(free, within_s=20)


def test_a_reader_that_falls_behind_is_let_go_when_a_response_may_take_no_longer(
    make_app: Callable[..., FastAPI],
) -> None:
    app = make_app(settings={"concurrent_requests": 1})
    with serving(app, response_timeout_s=1.0, send_buffer_bytes=SMALL) as url, connected(url, UNREAD):
        assert eventually(lambda: httpx.post(f"{url}/v1/completions", json=SHORT).status_code == 429)
        assert eventually(lambda: httpx.post(f"{url}/v1/completions", json=SHORT).status_code == 200, within_s=20)


def test_a_stream_whose_client_reads_too_little_of_it_ends_and_keeps_no_more(
    make_app: Callable[..., FastAPI], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "_MAX_UNREAD", 50)
    monkeypatch.setattr(running, "_PATIENCE_S", 0.01)
    app = make_app()
    with serving(app, send_buffer_bytes=SMALL) as url, connected(url, UNREAD) as reader:
        assert eventually(lambda: app.state.engine.num_open == 1)
        assert eventually(lambda: app.state.engine.num_open == 0)
        read = bytearray()
        while not read.endswith(b"0\r\n\r\n") and (part := reader.recv(2**16)):
            read += part
        assert b'"code":"slow_reader"' in read
        assert read.count(b"data: ") < 450


async def test_what_comes_at_one_go_is_given_time_to_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that a search has kept, or the scores of many prompts: nobody can have read it yet."""
    monkeypatch.setattr(running, "_PATIENCE_S", 0.2)
    backlog, chunk = running._Backlog(), GenerationChunk(0, token_ids=(5,))

    def put(number: int) -> None:
        for _ in range(number):
            assert not backlog.is_neglected()
            backlog.put(0, chunk)

    put(running._MAX_UNREAD * 2)
    for _ in range(3):
        # It gets less from time to time, though more comes meanwhile.
        for _ in range(100):
            await backlog.get()
        put(50)
        await asyncio.sleep(0.25)
    # Nothing has been read since.
    assert backlog.is_neglected()


@pytest.mark.parametrize("data", [None, HEAD + b"content-length: 100\r\n\r\n"])
def test_the_end_does_not_wait_for_a_client_that_does_not_read_or_send(
    make_app: Callable[..., FastAPI], data: bytes | None
) -> None:
    app = make_app()
    with contextlib.ExitStack() as server:
        url = server.enter_context(serving(app, grace_s=60, send_buffer_bytes=SMALL))
        with connected(url, UNREAD) if data is None else sent(url, data):
            time.sleep(0.5)
            started_s = time.monotonic()
            server.close()
            assert time.monotonic() - started_s < 15


def generated(app: FastAPI, **body: Any) -> float:
    """Tokens of the callers' minute that are gone after a client has hung up on a stream that it did not read."""
    with serving(app, send_buffer_bytes=SMALL) as url:
        with connected(url, {**UNREAD, **body}):
            assert eventually(lambda: app.state.engine.num_open == 1)
            time.sleep(0.5)
        assert eventually(lambda: app.state.engine.num_open == 0)
        text = httpx.get(f"{url}/metrics").text
    line = next(line for line in text.splitlines() if line.startswith("recontrol_generation_tokens_total{"))
    return float(line.rpartition(" ")[2])


def test_what_was_generated_for_a_client_that_hangs_up_unread_is_paid_for(
    make_app: Callable[..., FastAPI], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of a clock that stands still, so that nothing fills up again.
    monkeypatch.setattr(server.app, "LocalRates", lambda: LocalRates(lambda: 0.0))
    app = make_app(settings={"tokens_per_minute": 10**6}, token_delay_s=0.001)
    num_generated = generated(app)
    assert 0 < num_generated < UNREAD["max_tokens"]
    assert caller_tokens(app) == 10**6 - len("hi") - num_generated


def caller_tokens(app: FastAPI) -> float:
    """What is left of the one caller's minute."""
    layer: Any = app.middleware_stack
    while not hasattr(layer, "_callers"):
        layer = getattr(layer, "_app", None) or layer.app
    (caller,) = layer._callers._callers.values()
    return caller._tokens._level
