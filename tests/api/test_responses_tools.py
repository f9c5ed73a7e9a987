"""Functions in /v1/responses: offered flat, called in items of their own, streamed, answered, and forced."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from openai.types.responses import Response, ResponseFunctionToolCall
from starlette.testclient import TestClient

from server.api.messages import ChatMessage
from server.api.responses.body import ResponseBody
from tests.api.conftest import respond, serving
from tests.api.test_responses import QUESTION, events_of, without_what_differs

WEATHER = {
    "type": "function", "name": "weather", "description": "tell the weather", "strict": False,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}  # fmt: skip
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
CALLED = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"city": "Oslo"}'}
GIVEN = {"type": "function_call_output", "call_id": "call_1", "output": "rain"}
ASKED: dict[str, Any] = {"tools": [WEATHER], "seed": 1}


@pytest.fixture
def caller(make_app: Callable[..., FastAPI]) -> Callable[[str], TestClient]:
    """A client before a model that writes this text."""
    return lambda text: TestClient(make_app(text=text))


def plain(*items: Any) -> list[dict[str, Any]]:
    return ChatMessage.plain(ResponseBody.model_validate({"model": "m", "input": list(items)}).messages)


@pytest.mark.parametrize("text", [f"Let me look.\n{CALL}", CALL, f"{CALL}{CALL}", f"One.{CALL}Two.{CALL}", "Nothing."])
def test_calls_are_items_of_their_own_streamed_as_whole(caller: Callable[[str], TestClient], text: str) -> None:
    with caller(text) as client:
        whole = respond(client, **ASKED).json()
        events = events_of(client, **ASKED)
    response = Response.model_validate(whole)
    calls = [item for item in response.output if isinstance(item, ResponseFunctionToolCall)]
    assert len(calls) == text.count(CALL)
    assert all((call.name, json.loads(call.arguments)) == ("weather", {"city": "Oslo"}) for call in calls)
    assert {item["status"] for item in whole["output"]} == {"completed"}
    assert response.output_text.replace("\n", "") == text.replace(CALL, "").replace("\n", "")
    streamed = [{**item, "call_id": ""} for item in without_what_differs(events[-1]["response"])["output"]]
    assert streamed == [{**item, "call_id": ""} for item in without_what_differs(whole)["output"]]
    assert len({call.call_id for call in calls}) == len(calls)


def test_the_events_of_a_call_come_in_the_order_in_which_openai_sends_them(
    caller: Callable[[str], TestClient],
) -> None:
    with caller(f"Hm.{CALL}") as client:
        events = events_of(client, **ASKED)
    kinds = [event["type"].removeprefix("response.") for event in events if event.get("output_index") == 1]
    assert kinds == [
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
    ]  # fmt: skip
    added, delta, done, ended = [event for event in events if event.get("output_index") == 1]
    assert (added["item"]["arguments"], added["item"]["status"]) == ("", "in_progress")
    assert delta["delta"] == done["arguments"] == ended["item"]["arguments"]
    assert {delta["item_id"], done["item_id"]} == {ended["item"]["id"]}


def test_a_forced_call_is_streamed_as_it_is_written(client: TestClient) -> None:
    choice = {"type": "function", "name": "weather"}
    body = respond(client, **ASKED, tool_choice=choice).json()
    assert [(item["type"], item["name"]) for item in body["output"]] == [("function_call", "weather")]
    assert body["tool_choice"] == choice
    assert body["tools"] == [WEATHER]
    assert respond(client, **ASKED, tool_choice="required").json()["tool_choice"] == "required"


def test_no_tool_is_called_where_the_choice_is_none(caller: Callable[[str], TestClient]) -> None:
    with caller(CALL) as client:
        (item,) = respond(client, **ASKED, tool_choice="none").json()["output"]
    assert item["type"] == "message"


def test_one_call_at_most_without_parallel_calls(caller: Callable[[str], TestClient]) -> None:
    with caller(CALL + CALL) as client:
        assert len(respond(client, **ASKED, parallel_tool_calls=False).json()["output"]) == 1


def test_log_probabilities_are_those_of_the_text(caller: Callable[[str], TestClient]) -> None:
    asked = {**ASKED, "include": ["message.output_text.logprobs"]}
    with caller(f"Hm.{CALL}Ha <b>!</b>") as client:
        before, _, behind = respond(client, **asked).json()["output"]
    parts = [*before["content"], *behind["content"]]
    assert [part["text"] for part in parts] == ["Hm.", "Ha <b>!</b>"]
    assert ["".join(score["token"] for score in part["logprobs"]) for part in parts] == ["Hm.", "Ha <b>!</b>"]


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        ([QUESTION, CALLED, GIVEN], ["user", "assistant:1", "tool"]),
        ([QUESTION, {"role": "assistant", "content": "Hm."}, CALLED, GIVEN], ["user", "assistant:1", "tool"]),
        ([QUESTION, CALLED, {"role": "assistant", "content": "Hm."}, GIVEN], ["user", "assistant:1", "tool"]),
        ([QUESTION, CALLED, {**CALLED, "call_id": "b"}, {**GIVEN, "call_id": "b"}, GIVEN],
         ["user", "assistant:2", "tool", "tool"]),
        ([QUESTION, CALLED, GIVEN, {**CALLED, "call_id": "b"}, {**GIVEN, "call_id": "b"}],
         ["user", "assistant:1", "tool", "assistant:1", "tool"]),
        ([QUESTION, CALLED, GIVEN, {"role": "assistant", "content": "Rain."}, QUESTION],
         ["user", "assistant:1", "tool", "assistant", "user"]),
    ],
    ids=str,
)  # fmt: skip
def test_calls_and_what_they_gave_are_turns_of_a_chat(items: list[Any], messages: list[str]) -> None:
    shown = [
        message["role"] + (f":{len(message['tool_calls'])}" if "tool_calls" in message else "")
        for message in plain(*items)
    ]
    assert shown == messages


def test_a_call_goes_to_the_template_with_what_was_thought_before_it() -> None:
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]}
    parts = [{"type": "input_text", "text": "rain"}, {"type": "input_text", "text": "wind"}]
    _, call, given = plain(QUESTION, thought, {**CALLED, "id": "fc_1"}, {**GIVEN, "output": parts})
    function = {"name": "weather", "arguments": {"city": "Oslo"}}
    assert call == {
        "role": "assistant", "content": "", "reasoning_content": "hm",
        "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
    }  # fmt: skip
    assert given == {"role": "tool", "content": "rain\nwind", "name": "weather", "tool_call_id": "call_1"}


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools.0", "'web_search' are not served"),
        ({"tools": [{"type": "function"}]}, "tools.0.name", "required"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools.0.function", "no such field"),
        ({"tools": [{**WEATHER, "name": "a b"}]}, "tools.0.name", "1 to 64 of"),
        ({"tools": [WEATHER, WEATHER]}, "tools.1.name", "the name of tools.0"),
        ({"tools": [{**WEATHER, "defer_loading": True}]}, "tools.0.defer_loading", "no search"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "'x' is no function"),
        ({"tools": [WEATHER], "tool_choice": {"type": "file_search"}}, "tool_choice", "must be"),
        ({"tool_choice": "required"}, "tool_choice", "without tools"),
        ({"tools": [WEATHER], "tool_choice": "required", "text": {"format": {"type": "json_object"}}}, "text.format",
         "the text is calls"),
        ({"tools": [{**WEATHER, "parameters": {"type": "object", "pattern": "a"}}], "tool_choice": "required"},
         "tools.0.parameters", "regular expressions"),
        ({"input": [QUESTION, GIVEN]}, "input.1.call_id", "answers no call"),
        ({"input": [QUESTION, CALLED, GIVEN, GIVEN]}, "input.3.call_id", "answers no call"),
        ({"input": [QUESTION, CALLED, QUESTION, GIVEN]}, "input.3.call_id", "answers no call"),
        ({"input": [QUESTION, CALLED, CALLED, GIVEN]}, "input.2.call_id", "an earlier call of this turn"),
        ({"input": [CALLED, {**CALLED, "call_id": "b"}, {**GIVEN, "call_id": "b"}, CALLED]}, "input.3.call_id",
         "an earlier call of this turn"),
        ({"input": [{**CALLED, "arguments": 3}]}, "input.0.arguments", "string"),
        ({"input": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "input.0.tool_calls", "function_call"),
        ({"input": [{"role": "tool", "content": "rain", "tool_call_id": "a"}]}, "input.0.tool_call_id",
         "function_call_output"),
        ({"input": [{"role": "tool", "content": "rain"}]}, "input.0.role", "function_call_output"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_served_is_refused_by_its_field(
    client: TestClient, fields: dict[str, Any], field: str, message: str
) -> None:
    response = respond(client, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, field)
    assert message in error["message"]


def test_the_sdk_gives_back_its_output_with_what_the_function_gave(make_app: Callable[..., FastAPI]) -> None:
    tools: Any = [WEATHER]
    with (
        serving(make_app(text=f"Hm.\n{CALL}")) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none") as sdk,
    ):
        with sdk.responses.stream(model="fake", input="hi", tools=tools) as stream:
            first = stream.get_final_response()
        call = first.output[1]
        assert call.type == "function_call"
        history: Any = [
            {"role": "user", "content": "hi"},
            *first.output,
            {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
        ]
        assert sdk.responses.create(model="fake", input=history, tools=tools).status == "completed"
