"""What needs a real connection: the OpenAI SDK, and clients that leave."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator

import httpx
import openai
import pytest
from fastapi import FastAPI

from server.cli.connection import ConnectionLimits
from server.cli.http import DrainingServer
from tests.api.conftest import eventually, serving
from tests.api.test_slow_clients import HEAD, rest, sent

CONTROL = {"control": {"objective": {"type": "weighted_sum", "weights": {"positive": 1.0}}, "max_kl": 0.3}}


@pytest.fixture
def sdk(make_app: Callable[..., FastAPI]) -> Iterator[openai.OpenAI]:
    with serving(make_app()) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        yield client


def test_the_openai_sdk_completes_with_and_without_control_streaming_and_not(sdk: openai.OpenAI) -> None:
    for extra in (None, CONTROL):
        whole = sdk.completions.create(model="fake", prompt="hi", max_tokens=9, seed=1, extra_body=extra)
        stream = sdk.completions.create(model="fake", prompt="hi", max_tokens=9, seed=1, stream=True, extra_body=extra)
        assert "".join(event.choices[0].text for event in stream) == whole.choices[0].text
        assert hasattr(whole.choices[0], "control") == (extra is not None)


def test_the_openai_sdk_chats_streaming_and_not(sdk: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "hi"}]
    whole = sdk.chat.completions.create(model="fake@plain", messages=messages, max_tokens=9, seed=1)  # type: ignore[arg-type]
    stream = sdk.chat.completions.create(model="fake@plain", messages=messages, max_tokens=9, seed=1, stream=True)  # type: ignore[arg-type]
    assert "".join(event.choices[0].delta.content or "" for event in stream) == whole.choices[0].message.content


def test_the_openai_sdk_sees_our_errors_as_its_own(sdk: openai.OpenAI) -> None:
    assert sdk.models.list().data[0].id == "fake"
    with pytest.raises(openai.NotFoundError, match="Known models"):
        sdk.completions.create(model="nope", prompt="hi")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        sdk.completions.create(model="fake", prompt="hi", temperature=9)


@pytest.mark.parametrize("is_streaming", [True, False])
def test_a_client_that_leaves_frees_its_slots(make_app: Callable[..., FastAPI], is_streaming: bool) -> None:
    app = make_app(token_delay_s=0.02)
    engine = app.state.engine
    body = {"model": "fake", "prompt": ["hi", "ho"], "max_tokens": 4000, "stream": is_streaming}
    with serving(app) as url, httpx.Client() as client:
        if is_streaming:
            with client.stream("POST", f"{url}/v1/completions", json=body) as response:
                lines = response.iter_lines()  # kept: httpx hangs up when the iterator is dropped
                next(lines)
                assert engine.num_open == 2
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{url}/v1/completions", json=body, timeout=0.3)
        assert eventually(lambda: engine.num_open == 0)


@pytest.mark.parametrize("header", [b"", b"connection: upgrade\r\nupgrade: h2c\r\n"])
@pytest.mark.parametrize("more", [b"", b"G", b"G" * 200_000], ids=["nothing", "little", "much"])
def test_a_client_that_leaves_having_sent_more_frees_its_slots_too(
    make_app: Callable[..., FastAPI], header: bytes, more: bytes
) -> None:
    app = make_app(token_delay_s=0.02)
    body = json.dumps({"model": "fake", "prompt": "hi", "max_tokens": 4000}).encode()
    with serving(app) as url:
        client = sent(url, HEAD + header + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert eventually(lambda: app.state.engine.num_open == 1)
        with contextlib.suppress(OSError):
            client.sendall(more)
        client.close()
        assert eventually(lambda: app.state.engine.num_open == 0)


@pytest.mark.parametrize("is_streaming", [True, False])
def test_what_is_no_request_ends_the_response_before_it_without_a_traceback(
    make_app: Callable[..., FastAPI], is_streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(token_delay_s=0.02)
    body = json.dumps({"model": "fake", "prompt": "hi", "max_tokens": 4000, "stream": is_streaming}).encode()
    with serving(app) as url:
        client = sent(url, HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        assert eventually(lambda: app.state.engine.num_open == 1)
        if is_streaming:
            assert client.recv(2**16).startswith(b"HTTP/1.1 200")
        client.sendall(b"G")
        with contextlib.suppress(ConnectionError):
            rest(client)
        assert eventually(lambda: app.state.engine.num_open == 0)
    assert not [record for record in caplog.records if record.exc_info]


def test_no_connection_is_handed_to_what_knows_no_time_limits() -> None:
    server = DrainingServer(FastAPI(), ConnectionLimits(), grace_s=1.0, log_level="warning")
    server.config.load()
    assert server.config.ws_protocol_class is None


def test_a_huge_header_is_refused_and_the_server_lives(sdk: openai.OpenAI) -> None:
    url = str(sdk.base_url)
    # The server answers and hangs up; whether the answer arrives before the reset is the network's business.
    with contextlib.suppress(httpx.ReadError, httpx.WriteError):
        assert httpx.get(f"{url}models", headers={"x-big": "a" * 1_000_000}).status_code in (400, 431)
    assert httpx.get(f"{url}models").status_code == 200


def test_a_server_that_stops_ends_its_streams_with_an_error_and_done(make_app: Callable[..., FastAPI]) -> None:
    body = {"model": "fake", "prompt": "hi", "max_tokens": 4000, "stream": True}
    server = contextlib.ExitStack()
    url = server.enter_context(serving(make_app(token_delay_s=0.02)))
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=10) as response:
        lines = response.iter_lines()
        next(lines)
        stopping = threading.Thread(target=server.close)
        stopping.start()
        events = [line for line in lines if line]
    stopping.join()
    assert "server stopped" in events[-2]
    assert events[-1] == "data: [DONE]"
