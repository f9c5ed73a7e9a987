"""A chat's messages as clients write them and SDKs give them back, and what the engine is told of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
from fastapi import FastAPI
from openai.types.chat import ChatCompletion, ParsedChatCompletionMessage
from pydantic import BaseModel
from starlette.testclient import TestClient

from server.api.messages import ChatMessage
from server.types import ChatRendering
from tests.api.conftest import chat

HI = {"role": "user", "content": "hi"}
Told = list[tuple[list[dict[str, Any]], ChatRendering]]


@pytest.fixture
def told(make_app: Callable[..., FastAPI]) -> Iterator[tuple[TestClient, Told]]:
    """A client, and what the engine was told to render."""
    app, seen = make_app(), []
    encode_chat = app.state.engine.encode_chat

    def record(messages: Sequence[Mapping[str, str]], rendering: ChatRendering) -> list[int]:
        seen.append((messages, rendering))
        return encode_chat(messages, rendering)

    app.state.engine.encode_chat = record
    with TestClient(app) as client:
        yield client, seen


def text_of(told: tuple[TestClient, Told], message: dict[str, Any]) -> str:
    client, seen = told
    response = chat(client, messages=[HI, message, HI], max_tokens=1)
    assert response.status_code == 200, response.text
    return seen[-1][0][1]["content"]


def test_an_answer_of_the_sdk_is_taken_back_as_it_was_given(told: tuple[TestClient, Told]) -> None:
    client, seen = told
    message = ChatCompletion.model_validate(chat(client, max_tokens=3).json()).choices[0].message
    everything = {"refusal": None, "annotations": None, "audio": None, "function_call": None, "tool_calls": None}
    assert message.model_dump() == {"role": "assistant", "content": message.content, **everything}
    for given in (message.model_dump(), message.model_dump(exclude_unset=True)):
        assert text_of(told, given) == message.content
        assert seen[-1][0][1].keys() == {"role", "content"}


def test_an_answer_that_the_sdk_parsed_is_taken_back(told: tuple[TestClient, Told]) -> None:
    class Review(BaseModel):
        stars: int

    message = ParsedChatCompletionMessage[Review](role="assistant", content='{"stars": 3}', parsed=Review(stars=3))
    assert text_of(told, message.model_dump()) == '{"stars": 3}'


@pytest.mark.parametrize(
    "more",
    [
        {"tool_calls": []},
        {"annotations": []},
        {"annotations": [{"type": "url_citation", "url_citation": {"url": "x", "start_index": 0}}]},
        {"name": None, "tool_call_id": None},
        {"id": "msg-1", "images": None, "thinking_blocks": [], "provider_specific_fields": {"refusal": None}},
        {"reasoning": None, "reasoning_content": None},
        {"type": "text"},
        {"type": "message"},
    ],
    ids=str,
)
def test_what_says_nothing_to_the_model_changes_nothing(told: tuple[TestClient, Told], more: dict[str, Any]) -> None:
    _, seen = told
    assert text_of(told, {"role": "assistant", "content": "yes", **more}) == "yes"
    assert seen[-1][0][1] == {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": []}], ids=str)
def test_an_answer_without_text_is_an_empty_one(told: tuple[TestClient, Told], content: dict[str, Any]) -> None:
    assert text_of(told, {"role": "assistant", **content}) == ""


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb"),
        (["a", {"type": "input_text", "text": "b"}, {"type": "output_text", "text": "c"}], "a\nb\nc"),
        ([{"type": "text", "text": ""}, {"type": "text", "text": "b"}], "b"),
        ([{"type": "text", "text": "a\n"}, {"type": "text", "text": " b"}], "a\n\n b"),
        ([{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}, "annotations": []}], "a"),
        ([{"type": "text", "text": "a", "index": 0, "id": "msg-1"}], "a"),
        ([{"type": "refusal", "refusal": "no"}], "no"),
    ],
    ids=str,
)
def test_parts_are_joined_by_a_line_end(told: tuple[TestClient, Told], content: list[Any], text: str) -> None:
    assert text_of(told, {"role": "assistant", "content": content}) == text


def test_a_refusal_is_what_the_assistant_said(told: tuple[TestClient, Told]) -> None:
    assert text_of(told, {"role": "assistant", "content": None, "refusal": "I will not."}) == "I will not."


def test_a_name_and_past_reasoning_are_told_to_the_template(told: tuple[TestClient, Told]) -> None:
    client, seen = told
    named = {**HI, "name": "Ada"}
    for key in ("reasoning", "reasoning_content"):
        messages = [named, {"role": "assistant", "content": "4", key: "2 and 2"}, HI]
        assert chat(client, messages=messages, max_tokens=1).status_code == 200
        assert seen[-1][0] == [named, {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}, HI]


def test_calls_and_their_answers_are_told_to_the_template(told: tuple[TestClient, Told]) -> None:
    client, seen = told
    functions = [
        {"name": "add", "arguments": '{"a": 2}'},
        {"name": "now", "arguments": ""},
        {"name": "x", "arguments": "{"},
        {"name": "nan", "arguments": '{"a": NaN}'},
        {"name": "huge", "arguments": '{"a": [1e999]}'},
    ]
    calls = [{"id": f"call-{i}", "type": "function", "function": function} for i, function in enumerate(functions)]
    answer = {"role": "tool", "tool_call_id": "call-0", "content": [{"type": "text", "text": "4"}]}
    messages = [HI, {"role": "assistant", "content": None, "tool_calls": calls}, answer]
    assert chat(client, messages=messages, max_tokens=1).status_code == 200
    _, assistant, tool = seen[-1][0]
    given = [call["function"]["arguments"] for call in assistant["tool_calls"]]
    assert given == [{"a": 2}, {}, "{", '{"a": NaN}', '{"a": [1e999]}']
    assert tool == {"role": "tool", "content": "4", "name": "add", "tool_call_id": "call-0"}


def test_a_later_turn_may_use_the_id_of_a_call_again_for_another_function() -> None:
    turns = [
        [
            {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": name}}]},
            {"role": "tool", "tool_call_id": "a", "content": "4"},
        ]
        for name in ("add", "now")
    ]
    messages = [ChatMessage.model_validate(message) for turn in turns for message in turn]
    assert [message["name"] for message in ChatMessage.plain(messages) if message["role"] == "tool"] == ["add", "now"]


def test_the_older_form_of_an_answer_is_refused_with_the_reason(client: TestClient) -> None:
    error = chat(client, messages=[HI, {"role": "function", "content": "4", "name": "add"}]).json()["error"]
    assert error["param"] == "messages.1.role"
    assert "use the newer, tool" in error["message"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ChatRendering()),
        ({"add_generation_prompt": None, "continue_final_message": None}, ChatRendering()),
        ({"add_generation_prompt": False}, ChatRendering(add_generation_prompt=False)),
        ({"add_special_tokens": True}, ChatRendering(add_special_tokens=True)),
        (
            {"continue_final_message": True, "add_generation_prompt": False},
            ChatRendering(add_generation_prompt=False, continue_final_message=True),
        ),
        ({"continue_final_message": True}, ChatRendering(add_generation_prompt=False, continue_final_message=True)),
        (
            {"chat_template_kwargs": {"enable_thinking": False, "date_string": None}},
            ChatRendering(variables={"enable_thinking": False}),
        ),
    ],
    ids=str,
)
def test_chat_and_tokenize_render_alike(
    told: tuple[TestClient, Told], fields: dict[str, Any], expected: ChatRendering
) -> None:
    client, seen = told
    messages = [HI, {"role": "assistant", "content": "well"}]
    assert chat(client, messages=messages, max_tokens=1, **fields).status_code == 200
    assert client.post("/tokenize", json={"messages": messages, **fields}).status_code == 200
    assert seen == [(messages, expected)] * 2


@pytest.mark.parametrize("role", ["user", "system"])
def test_only_an_assistants_message_is_continued(client: TestClient, role: str) -> None:
    error = chat(client, messages=[{"role": role, "content": "hi"}], continue_final_message=True).json()["error"]
    assert error["param"] == "continue_final_message"
    assert error["message"].endswith(f"the last message must be the assistant's; its role is {role}")


def test_a_message_is_not_continued_and_answered_at_once(client: TestClient) -> None:
    messages = [HI, {"role": "assistant", "content": "well"}]
    response = chat(client, messages=messages, continue_final_message=True, add_generation_prompt=True)
    assert response.status_code == 400
    assert "cannot be true together with add_generation_prompt" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "value",
    [3, {"messages": []}, {"add_generation_prompt": True}, {"enable_thinking": 1}, {"enable_thinking": "true"},
     {"thinking_budget": True}, {"thinking_budget": -1}, {"date_string": "x" * 65}, {"x" * 5000: 1}],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_a_template_may_not_be_told_is_refused_with_the_reason(client: TestClient, value: Any) -> None:
    error = chat(client, chat_template_kwargs=value).json()["error"]
    assert error["param"] == "chat_template_kwargs"
    assert len(error["message"]) < 400
