"""Chats of models that reason: what is told as reasoning and what as the answer, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from server.engines.fake import FakeEngine
from server.errors import ConfigurationError
from server.types import ChatRendering
from tests.api.conftest import chat, complete, serving

STEER = {"objective": {"weights": {"positive": 1.0}}, "trace": True}
OFF = {"chat_template_kwargs": {"enable_thinking": False}}
OPENED = {"opens_reasoning": True}
WHOLE = {"max_tokens": 40, "seed": 1}


@pytest.fixture(params=[{}, OPENED], ids=["the model opens", "the template opens"])
def client(request: pytest.FixtureRequest, make_app: Callable[..., FastAPI]) -> Any:
    with TestClient(make_app(reasoning_tokens=6, **request.param)) as client:
        yield client


def choice_of(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def streamed(client: TestClient, **body: Any) -> dict[str, str | None]:
    told: dict[str, str | None] = {}
    for event in events(chat(client, stream=True, **body)):
        for key, text in event["choices"][0]["delta"].items():
            told[key] = (told.get(key) or "") + text if key != "role" else text
    return told


def test_reasoning_is_told_apart_without_its_marks(client: TestClient) -> None:
    message = choice_of(chat(client, **WHOLE))["message"]
    assert len(message["reasoning_content"]) == 6
    assert message["reasoning"] == message["reasoning_content"]
    assert not any(mark in message["content"] for mark in "<>/")
    assert len(message["content"]) in (40 - 6 - len("</think>"), 40 - 6 - len("<think></think>"))


def test_what_is_streamed_joins_to_the_whole(client: TestClient) -> None:
    for body in (WHOLE, {"max_tokens": 3}, {"max_tokens": 9}, {**WHOLE, **OFF}, {**WHOLE, "logprobs": True}):
        whole = choice_of(chat(client, **{"seed": 5, **body}))["message"]
        told = streamed(client, **{"seed": 5, **body})
        assert {key: told.get(key) or None for key in whole} == whole


def test_reasoning_that_is_cut_off_leaves_no_content(client: TestClient) -> None:
    choice = choice_of(chat(client, max_tokens=9))
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "length"


def test_reasoning_that_is_off_leaves_all_to_the_answer(client: TestClient) -> None:
    message = choice_of(chat(client, **WHOLE, **OFF))["message"]
    assert len(message["content"]) == 40
    assert message["reasoning_content"] is None


def test_tokens_of_reasoning_are_counted(client: TestClient) -> None:
    for body, least in ((WHOLE, 6), ({**WHOLE, "include_reasoning": False}, 6), ({**WHOLE, **OFF}, 0)):
        usage = chat(client, **body).json()["usage"]
        counted = usage["completion_tokens_details"]["reasoning_tokens"]
        assert usage["completion_tokens"] == 40
        assert least <= counted <= (least and least + len(">") + len("</think>"))
        last = events(chat(client, **body, stream=True, stream_options={"include_usage": True}))[-1]
        assert last["usage"] == usage


def test_reasoning_may_be_left_out_of_what_is_told(client: TestClient) -> None:
    asked = {**WHOLE, "logprobs": True, "control": STEER}
    told, hidden = (choice_of(chat(client, **asked, include_reasoning=include)) for include in (True, False))
    assert hidden["message"] == {**told["message"], "reasoning_content": None, "reasoning": None}
    tokens = [[entry["token"] for entry in choice["logprobs"]["content"]] for choice in (told, hidden)]
    assert "".join(tokens[0]).endswith(told["message"]["reasoning"] + "</think>" + told["message"]["content"])
    assert "".join(tokens[1]).removeprefix("<think") == told["message"]["content"]
    assert len(hidden["control_trace"]) == len(tokens[1])
    assert "reasoning" not in str(events(chat(client, **asked, include_reasoning=False, stream=True)))


def test_stop_strings_are_looked_for_in_the_answer_alone(client: TestClient) -> None:
    message = choice_of(chat(client, **WHOLE))["message"]
    reasoned = choice_of(chat(client, **WHOLE, stop=[message["reasoning"][:2], "</think>"]))
    assert reasoned["message"]["reasoning"] == message["reasoning"]
    stop = message["content"][3:6]
    stopped = choice_of(chat(client, **WHOLE, stop=stop))
    assert stopped["message"]["content"] == message["content"].partition(stop)[0]
    assert (stopped["message"]["reasoning"], stopped["finish_reason"]) == (message["reasoning"], "stop")


def test_control_acts_on_the_part_that_it_names(client: TestClient) -> None:
    whole = choice_of(chat(client, **WHOLE, control=STEER))
    assert len(whole["control_trace"]) == 40
    for phase, size in (("answer", len(whole["message"]["content"])), ("both", 40)):
        traced = choice_of(chat(client, **WHOLE, control={**STEER, "phase": phase}))["control_trace"]
        assert size - 1 <= len(traced) <= size
    reasoning = choice_of(chat(client, **WHOLE, control={**STEER, "phase": "reasoning"}))
    assert len(reasoning["control_trace"]) == 6 + len("</think>")


@pytest.mark.parametrize(
    ("send", "body", "reason"),
    [(chat, OFF, "the prompt has ended the reasoning"), (complete, {}, "only chats are told apart into parts")],
)
def test_control_of_reasoning_alone_is_refused_where_there_is_none(
    client: TestClient, send: Callable[..., httpx.Response], body: dict[str, Any], reason: str
) -> None:
    refused = send(client, **body, control={**STEER, "phase": "reasoning"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "control.phase"
    assert reason in refused.json()["error"]["message"]
    assert send(client, **body, control={**STEER, "phase": "answer"}).status_code == 200


def test_a_model_that_marks_no_reasoning_answers_alone(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app()) as client:
        refused = chat(client, control={**STEER, "phase": "reasoning"})
        assert "this model's chat template marks no reasoning" in refused.json()["error"]["message"]
        answer = chat(client, control={**STEER, "phase": "answer"}).json()
        assert answer["choices"][0]["message"].keys() == {"role", "content"}
        assert "completion_tokens_details" not in answer["usage"]


def test_an_answer_that_is_continued_goes_on_in_its_part(client: TestClient) -> None:
    goes_on = {"continue_final_message": True, "add_generation_prompt": False, **WHOLE}
    for said, is_reasoning in (("<think>So", True), ("<think>So</think>", False), ("Hello", False)):
        messages = [{"role": "user", "content": "<think>"}, {"role": "assistant", "content": said}]
        message = choice_of(chat(client, messages=messages, **goes_on))["message"]
        assert (message["reasoning"] is not None) is is_reasoning
        assert len(message["content"]) == (40 - 6 - len("</think>") if is_reasoning else 40)


@pytest.mark.parametrize("typed", ["<think>", "</think>", "<think></think>"])
def test_what_a_user_types_is_no_part_of_the_response(client: TestClient, typed: str) -> None:
    message = choice_of(chat(client, messages=[{"role": "user", "content": typed}], **WHOLE))["message"]
    assert len(message["reasoning"]) == 6


def test_reasoning_that_was_told_is_told_to_the_template_again(client: TestClient) -> None:
    told: list[Any] = []
    engine: FakeEngine = client.app.state.engine  # type: ignore[attr-defined]
    encode = engine.encode_chat

    def encode_chat(messages: Any, rendering: ChatRendering | None = None) -> list[int]:
        told.append(messages)
        return encode(messages, rendering)

    engine.encode_chat = encode_chat  # type: ignore[method-assign]
    message = choice_of(chat(client, **WHOLE))["message"]
    again = chat(client, messages=[{"role": "user", "content": "hi"}, message, {"role": "user", "content": "and?"}])
    assert again.status_code == 200
    assert told[-1][1] == {
        "role": "assistant", "content": message["content"], "reasoning_content": message["reasoning"]
    }  # fmt: skip


def test_pinned_control_is_not_narrowed_by_a_callers_phase(make_app: Callable[..., FastAPI]) -> None:
    pinned = {"objective": {"weights": {"plain": 1.0}}}
    with TestClient(make_app(reasoning_tokens=6, settings={"pinned_control": json.dumps(pinned)})) as client:
        for phase in ("answer", "reasoning"):
            refused = chat(client, control={**STEER, "phase": phase})
            assert refused.json()["error"]["param"] == "control.phase"
        assert len(choice_of(chat(client, **WHOLE, control=STEER))["control_trace"]) == 40
    answers = {"settings": {"pinned_control": json.dumps({**pinned, "phase": "answer"})}}
    with TestClient(make_app(reasoning_tokens=6, **answers)) as client:
        assert len(choice_of(chat(client, **WHOLE, control=STEER))["control_trace"]) < 40
    with pytest.raises(ConfigurationError, match="pinned_control: phase: not reasoning alone"):
        make_app(settings={"pinned_control": json.dumps({**pinned, "phase": "reasoning"})})


def test_a_model_is_told_apart_by_its_own_template(make_embedded_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_embedded_app(reasoning_format="think")) as client:
        asked: dict[str, Any] = {"model": "tiny", "seed": 3, "max_tokens": 12, "temperature": 0.5}
        answer = choice_of(chat(client, **asked))["message"]
        assert answer["content"]
        assert answer["reasoning"] is None
        client.app.state.engine._tokenizer.chat_template += "{% if add_generation_prompt %}<think>{% endif %}"  # type: ignore[attr-defined]
        reasoned = chat(client, **asked).json()
        message = reasoned["choices"][0]["message"]
        assert message["content"] is None
        assert message["reasoning"]
        details = reasoned["usage"]["completion_tokens_details"]
        assert details == {"reasoning_tokens": reasoned["usage"]["completion_tokens"]}
        schema = chat(client, **asked, response_format={"type": "json_object"}).json()["error"]
        assert (schema["param"], schema["code"]) == ("response_format", "invalid_value")


def test_the_openai_sdk_reads_reasoning_whole_and_streamed(make_app: Callable[..., FastAPI]) -> None:
    with serving(make_app(reasoning_tokens=6)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        asked: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], **WHOLE}
        whole = client.chat.completions.create(**asked)
        message = whole.choices[0].message
        assert len(message.reasoning_content) == 6  # type: ignore[attr-defined]
        assert whole.usage is not None
        assert whole.usage.completion_tokens_details is not None
        assert whole.usage.completion_tokens_details.reasoning_tokens
        deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)]
        assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == message.reasoning_content  # type: ignore[attr-defined]
        assert "".join(delta.content or "" for delta in deltas) == message.content
