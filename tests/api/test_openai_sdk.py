"""The OpenAI SDK against a real socket: sync and async, streamed and not, raw, too slow, and cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from fastapi import FastAPI

from tests.api.conftest import eventually, serving

KEY = "sk-test-0123456789"
CONTROL = {"control": {"objective": {"weights": {"positive": 1.0}}, "max_kl": 0.3, "trace": True}}
MESSAGES: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
def app(make_app: Callable[..., FastAPI]) -> FastAPI:
    return make_app(settings={"api_keys": KEY}, token_delay_s=0.005)


@pytest.fixture
def url(app: FastAPI) -> Iterator[str]:
    with serving(app) as url:
        yield f"{url}/v1"


@pytest.fixture
def sdk(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        yield client


def test_our_fields_travel_in_extra_body_and_our_answers_come_back_as_attributes(sdk: openai.OpenAI) -> None:
    extra = {**CONTROL, "min_p": 0.05, "repetition_penalty": 1.1, "stop_token_ids": [0], "ignore_eos": True}
    whole = sdk.completions.create(
        model="fake", prompt="hi", max_tokens=5, seed=1, logit_bias={"101": 1}, presence_penalty=0.1, extra_body=extra
    )
    choice: Any = whole.choices[0]
    assert choice.control["value_after"] == {"positive": 0.5}
    assert len(choice.control_trace) == 5


def test_the_stream_helper_collects_a_chat(sdk: openai.OpenAI) -> None:
    options: Any = {"model": "fake", "messages": MESSAGES, "seed": 1, "stop": ["e"], "logprobs": True}
    with sdk.chat.completions.stream(**options) as stream:
        final = stream.get_final_completion()
    whole = sdk.chat.completions.create(**options)
    assert final.choices[0].finish_reason == "stop"
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].logprobs == whole.choices[0].logprobs


def test_a_raw_response_has_our_headers(sdk: openai.OpenAI) -> None:
    raw = sdk.completions.with_raw_response.create(
        model="fake", prompt="hi", max_tokens=2, extra_headers={"X-Request-Id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"
    assert raw.parse().usage.completion_tokens == 2  # type: ignore[union-attr]
    with sdk.completions.with_streaming_response.create(
        model="fake", prompt="hi", max_tokens=2, stream=True
    ) as raw_stream:
        lines = [line for line in raw_stream.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[0].removeprefix("data: "))["object"] == "text_completion"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"model": "nope"}, openai.NotFoundError),
        ({"temperature": 9}, openai.BadRequestError),
        ({"extra_body": {"min_p": 2}}, openai.BadRequestError),
        ({"extra_headers": {"Authorization": "Bearer wrong"}}, openai.AuthenticationError),
    ],
)
def test_our_errors_are_the_sdks_own(sdk: openai.OpenAI, options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        sdk.completions.create(**{"model": "fake", "prompt": "hi", **options})
    assert caught.value.request_id  # type: ignore[attr-defined]
    assert caught.value.body["message"]  # type: ignore[attr-defined,index]


def test_a_rate_limit_is_the_sdks_own_error_and_waited_for(make_app: Callable[..., FastAPI]) -> None:
    options: Any = {"model": "fake", "prompt": "hi", "max_tokens": 1}
    with serving(make_app(settings={"api_keys": KEY, "requests_per_minute": 60})) as url:

        def flood(sdk: openai.OpenAI) -> None:
            for _ in range(200):
                sdk.completions.create(**options)

        with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as hasty:
            with pytest.raises(openai.RateLimitError, match="60 requests a minute"):
                flood(hasty)
            assert hasty.with_options(max_retries=3).completions.create(**options).choices


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_that_does_not_wait_frees_its_slot(app: FastAPI, sdk: openai.OpenAI, is_streamed: bool) -> None:
    engine = app.state.engine
    slow = sdk.with_options(timeout=0.2)
    if is_streamed:
        stream = sdk.completions.create(model="fake", prompt="hi", max_tokens=4000, stream=True)
        next(iter(stream))
        assert engine.num_open == 1
        stream.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            slow.completions.create(model="fake", prompt="hi", max_tokens=4000)
    assert eventually(lambda: engine.num_open == 0)


async def test_the_async_client_completes_streams_and_chats_at_once(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key=KEY) as sdk:

        async def streamed() -> str:
            stream = await sdk.completions.create(model="fake", prompt="hi", max_tokens=8, seed=3, stream=True)
            return "".join([event.choices[0].text async for event in stream])

        whole = sdk.completions.create(model="fake", prompt="hi", max_tokens=8, seed=3)
        answers = await asyncio.gather(streamed(), whole, streamed())
        assert answers[0] == answers[1].choices[0].text == answers[2]
        chatted = await sdk.chat.completions.create(model="fake@plain", messages=MESSAGES, max_tokens=3)
        assert chatted.choices[0].finish_reason == "length"
        assert [model.id async for model in sdk.models.list()] == ["fake", "fake@positive", "fake@plain"]


async def test_a_cancelled_task_frees_its_slot(app: FastAPI, url: str) -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key=KEY) as sdk:
        task = asyncio.create_task(sdk.completions.create(model="fake", prompt="hi", max_tokens=4000))
        while app.state.engine.num_open == 0:
            await asyncio.sleep(0.01)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(eventually, lambda: app.state.engine.num_open == 0)


@pytest.mark.parametrize("end", ["close", "cancel"])
async def test_an_async_stream_that_is_left_frees_its_slot(app: FastAPI, url: str, end: str) -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key=KEY) as sdk:
        seen: list[str] = []

        async def read() -> None:
            stream = await sdk.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=4000, stream=True)
            async for event in stream:
                seen.append(event.choices[0].delta.content or "")
                if end == "close" and len(seen) == 3:
                    await stream.close()
                    return

        task = asyncio.create_task(read())
        while len(seen) < 3:
            await asyncio.sleep(0.01)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(eventually, lambda: app.state.engine.num_open == 0)


async def test_the_async_client_reads_raw_responses_of_a_chat(url: str) -> None:
    options: Any = {"model": "fake", "messages": MESSAGES, "max_tokens": 3, "seed": 1}
    async with openai.AsyncOpenAI(base_url=url, api_key=KEY) as sdk:
        raw = await sdk.chat.completions.with_raw_response.create(**options, extra_headers={"X-Request-Id": "mine-2"})
        assert raw.headers["x-request-id"] == raw.request_id == "mine-2"
        whole = raw.parse().choices[0].message.content
        streaming = sdk.chat.completions.with_streaming_response.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
        async with streaming as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            events = [event async for event in await response.parse()]
        assert "".join(event.choices[0].delta.content or "" for event in events if event.choices) == whole
        assert events[-1].usage.completion_tokens == 3


def test_a_stream_whose_next_token_does_not_come_in_time_is_a_timeout(make_app: Callable[..., FastAPI]) -> None:
    app = make_app(token_delay_s=0.6)
    with (
        serving(app) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=0.2) as sdk,
        pytest.raises(openai.APITimeoutError),
    ):
        list(sdk.completions.create(model="fake", prompt="hi", max_tokens=9, stream=True))
    assert eventually(lambda: app.state.engine.num_open == 0)


def test_a_deadline_of_ours_is_an_error_that_the_sdk_does_not_try_again(app: FastAPI, sdk: openai.OpenAI) -> None:
    options: Any = {"model": "fake", "prompt": "hi", "max_tokens": 4000, "extra_body": {"timeout_s": 0.1}}
    asked: list[object] = []
    generate = app.state.engine.generate
    app.state.engine.generate = lambda request: asked.append(request) or generate(request)
    with pytest.raises(openai.InternalServerError, match="not complete after") as caught:
        sdk.with_options(max_retries=2).completions.create(**options)
    assert caught.value.status_code == 504
    assert len(asked) == 1
    with pytest.raises(openai.APIError, match="not complete after"):
        list(sdk.completions.create(**options, stream=True))
