"""`client.responses` of the OpenAI SDK against a real socket: created, streamed, parsed, given back, and cancelled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import openai
import pytest
from fastapi import FastAPI
from openai.types.responses import ResponseTextDeltaEvent
from pydantic import BaseModel

from tests.api.conftest import eventually, serving

KEY = "sk-test-0123456789"
ASKED: dict[str, Any] = {"model": "fake", "input": "hi", "extra_body": {"seed": 1}}
TINY: dict[str, Any] = {"model": "tiny", "input": "hi", "extra_body": {"seed": 1}}
QUESTION: dict[str, Any] = {"role": "user", "content": "and then?"}


class Review(BaseModel):
    stars: Literal[1, 2, 3]


@pytest.fixture
def app(make_app: Callable[..., FastAPI]) -> FastAPI:
    return make_app(settings={"api_keys": KEY}, token_delay_s=0.005)


@pytest.fixture
def sdk(app: FastAPI) -> Iterator[openai.OpenAI]:
    with serving(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def tiny(make_embedded_app: Callable[..., FastAPI]) -> Iterator[openai.OpenAI]:
    """The SDK before a tiny model."""
    with serving(make_embedded_app()) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        yield client


def test_the_sdk_creates_streams_and_collects_the_same_response(sdk: openai.OpenAI) -> None:
    whole = sdk.responses.create(**ASKED, max_output_tokens=6)
    deltas = [
        event.delta
        for event in sdk.responses.create(**ASKED, max_output_tokens=6, stream=True)
        if isinstance(event, ResponseTextDeltaEvent)
    ]
    assert "".join(deltas) == whole.output_text
    assert len(deltas) == 6
    with sdk.responses.stream(**ASKED, max_output_tokens=6) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
    assert snapshots[-1] == whole.output_text


def test_the_stream_helper_has_a_final_response_where_the_text_ended_by_itself(sdk: openai.OpenAI) -> None:
    asked = {**ASKED, "extra_body": {"seed": 1, "stop": ["e", "a"]}}
    with sdk.responses.stream(**asked) as stream:
        final = stream.get_final_response()
    assert final.status == "completed"
    assert final.output_text == sdk.responses.create(**asked).output_text


def test_an_output_is_given_back_as_input_of_the_next_turn(sdk: openai.OpenAI) -> None:
    first = sdk.responses.create(**ASKED, max_output_tokens=4, include=["message.output_text.logprobs"])
    history: Any = [{"role": "user", "content": "hi"}, *first.output, QUESTION]
    again = sdk.responses.create(model="fake", input=history, max_output_tokens=4)
    dumped: Any = [{"role": "user", "content": "hi"}, *(item.model_dump() for item in first.output), QUESTION]
    assert sdk.responses.create(model="fake", input=dumped, max_output_tokens=4).usage == again.usage
    assert again.usage is not None
    assert again.usage.input_tokens > len("user: hi\nuser: and then?\n")


def test_control_travels_in_extra_body_and_comes_back_as_an_attribute(sdk: openai.OpenAI) -> None:
    extra = {"control": {"objective": {"weights": {"positive": 1.0}}, "trace": True}}
    response: Any = sdk.responses.create(model="fake", input="hi", max_output_tokens=3, extra_body=extra)
    assert response.control["value_after"] == {"positive": 0.5}
    assert len(response.control_trace) == 3
    stream = sdk.responses.create(model="fake", input="hi", max_output_tokens=3, extra_body=extra, stream=True)
    last: Any = list(stream)[-1]
    assert last.response.control == response.control


def test_our_errors_are_the_sdks_own(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="none is stored"):
        sdk.responses.retrieve("resp_1")
    with pytest.raises(openai.NotFoundError, match="none is stored"):
        sdk.responses.delete("resp_1")
    with pytest.raises(openai.NotFoundError, match="/v1/value"):
        sdk.with_options(max_retries=2).embeddings.create(model="fake", input="hi")
    with pytest.raises(openai.BadRequestError, match="no response is stored"):
        sdk.responses.create(**ASKED, previous_response_id="resp_1")
    with pytest.raises(openai.BadRequestError, match="no response is stored"):
        sdk.responses.create(**ASKED, store=True)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_that_leaves_frees_its_slot(app: FastAPI, sdk: openai.OpenAI, is_streamed: bool) -> None:
    if is_streamed:
        stream = sdk.responses.create(**ASKED, stream=True)
        next(iter(stream))
        assert app.state.engine.num_open == 1
        stream.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            sdk.with_options(timeout=0.2).responses.create(**ASKED)
    assert eventually(lambda: app.state.engine.num_open == 0)


def test_a_pydantic_model_is_parsed_streamed_and_given_back(tiny: openai.OpenAI) -> None:
    parsed = tiny.responses.parse(**TINY, text_format=Review)
    assert parsed.output_parsed is not None
    assert parsed.status == "completed"
    with tiny.responses.stream(**TINY, text_format=Review) as stream:
        assert stream.get_final_response().output_parsed == parsed.output_parsed
    history: Any = [*parsed.output, QUESTION]
    assert tiny.responses.create(model="tiny", input=history, max_output_tokens=2).output_text


def test_a_guardrail_ends_a_response_as_a_filter_of_content(tiny: openai.OpenAI) -> None:
    control = {"objective": {"weights": {"positive": 1.0}}, "stop_below": {"positive": 1e6}}
    asked = {**TINY, "extra_body": {"control": control}}
    response: Any = tiny.responses.create(**asked)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "content_filter")
    assert response.control["stopped_by"]["positive"]["bound"] == 1e6
    events: list[Any] = list(tiny.responses.create(**asked, stream=True))
    last = events[-1]
    assert (last.type, last.response.incomplete_details) == ("response.incomplete", response.incomplete_details)


def test_control_moves_a_response_as_it_moves_a_chat(tiny: openai.OpenAI) -> None:
    extra = {"seed": 1, "control": {"objective": {"weights": {"positive": 1.0}}, "max_kl": 0.3}}
    response: Any = tiny.responses.create(model="tiny", input="hi", max_output_tokens=8, extra_body=extra)
    chat: Any = tiny.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=8, extra_body=extra
    )
    assert response.output_text == chat.choices[0].message.content
    assert response.control == chat.choices[0].control
    assert response.control["mean_kl"] > 0
    assert response.control["value_after"]["positive"] > response.control["value_before"]["positive"]
