"""Tools of a chat: what a body may offer and force, what the model is told, and how its calls come back."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from openai.types.chat import ChatCompletion
from pydantic import BaseModel
from starlette.testclient import TestClient

from server.engines.fake import FakeEngine
from tests.api.conftest import chat, serving
from tests.api.test_completions import events

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": SCHEMA}}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW]
HI = {"role": "user", "content": "hi"}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
NEXT = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
ANSWER = {"role": "tool", "tool_call_id": "a", "content": "4"}
NAMED = {"type": "function", "function": {"name": "now"}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def call(call_id: str, name: str = "weather", arguments: str = '{"city": "Bern"}') -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.fixture
def ask(make_app: Callable[..., FastAPI]) -> Callable[..., dict[str, Any]]:
    def ask(text: str | None = None, *, call_format: str = "hermes", **body: Any) -> dict[str, Any]:
        """The first choice of a chat with tools, whose engine writes this text."""
        with TestClient(make_app(text=text, call_format=call_format)) as client:
            response = chat(client, **{"tools": TOOLS, "max_tokens": 300, **body})
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]

    return ask


def calls_of(choice: dict[str, Any]) -> list[tuple[str, Any]]:
    calls = choice["message"].get("tool_calls", [])
    return [(made["function"]["name"], json.loads(made["function"]["arguments"])) for made in calls]


def error_of(client: TestClient, **body: Any) -> dict[str, Any]:
    response = chat(client, **body)
    assert response.status_code == 400, response.text
    return response.json()["error"]


def test_a_call_is_told_as_openai_tells_it(ask: Callable[..., dict[str, Any]]) -> None:
    choice = ask(CALL)
    (made,) = choice["message"]["tool_calls"]
    assert made.pop("id").startswith("call_")
    assert made == {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "tool_calls"


def test_text_before_calls_is_content_and_ids_differ(ask: Callable[..., dict[str, Any]]) -> None:
    message = ask(f"I look.\n{CALL}\n{NEXT}")["message"]
    assert message["content"] == "I look."
    assert len({made["id"] for made in message["tool_calls"]}) == 2


def test_a_text_without_calls_is_an_answer(ask: Callable[..., dict[str, Any]]) -> None:
    choice = ask("Hello.")
    assert choice["message"] == {"role": "assistant", "content": "Hello."}
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("text", [CALL.replace("weather", "whether"), CALL.replace('"arguments"', "arguments")])
def test_what_is_no_call_stays_text(ask: Callable[..., dict[str, Any]], text: str) -> None:
    choice = ask(text)
    assert choice["message"] == {"role": "assistant", "content": text}
    assert choice["finish_reason"] == "stop"


def test_without_parallel_calls_the_response_ends_behind_the_first(ask: Callable[..., dict[str, Any]]) -> None:
    choice = ask(f"{CALL}\n{NEXT}", parallel_tool_calls=False)
    assert calls_of(choice) == [("weather", {"city": "Bern"})]
    assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("choice", ["none", allowed("auto", "now")], ids=str)
def test_a_tool_that_may_not_be_called_is_not_called(ask: Callable[..., dict[str, Any]], choice: Any) -> None:
    assert ask(CALL, tool_choice=choice)["message"]["content"] == CALL


@pytest.mark.parametrize(
    ("choice", "name"),
    [("required", "weather"), (NAMED, "now"), (allowed("required", "now"), "now")],
    ids=str,
)
def test_a_forced_call_is_the_whole_response(ask: Callable[..., dict[str, Any]], choice: Any, name: str) -> None:
    made = ask(tool_choice=choice)
    assert calls_of(made) == [(name, {})]
    assert made["message"]["content"] is None
    assert made["finish_reason"] == "tool_calls"


def test_a_forced_call_that_the_limit_cuts_ends_by_length(ask: Callable[..., dict[str, Any]]) -> None:
    choice = ask(CALL, tool_choice="required", max_tokens=CALL.index("rn"))
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Be'


def test_a_forced_call_that_the_limit_cuts_before_its_name_is_no_text(ask: Callable[..., dict[str, Any]]) -> None:
    choice = ask(tool_choice="required", max_tokens=4)
    assert (choice["message"], choice["finish_reason"]) == ({"role": "assistant", "content": ""}, "length")


def test_every_choice_has_its_own_calls(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(text=CALL)) as client:
        choices = chat(client, tools=TOOLS, max_tokens=100, n=2).json()["choices"]
    assert [calls_of(choice) for choice in choices] == [[("weather", {"city": "Bern"})]] * 2
    assert len({choice["message"]["tool_calls"][0]["id"] for choice in choices}) == 2


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_stream_adds_up_to_the_whole(make_app: Callable[..., FastAPI], choice: str) -> None:
    text = f"{CALL}\n{NEXT}" if choice == "required" else f"I look.\n{CALL}\n{NEXT}"
    body = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 300, "logprobs": True}
    with TestClient(make_app(text=text)) as client:
        whole = chat(client, **body).json()["choices"][0]
        told = events(chat(client, **body, stream=True))
    parts = [event["choices"][0] for event in told]
    deltas = [made for part in parts for made in part["delta"].get("tool_calls", [])]
    named = [made for made in deltas if "id" in made]
    assert [made["index"] for made in named] == [0, 1]
    assert all(made.keys() == {"index", "id", "type", "function"} for made in named)
    assert [made["function"] for made in named] == [{"name": name, "arguments": ""} for name in ("weather", "now")]
    joined = ["".join(made["function"]["arguments"] for made in deltas if made["index"] == i) for i in range(2)]
    assert joined == [made["function"]["arguments"] for made in whole["message"]["tool_calls"]]
    assert "".join(part["delta"].get("content") or "" for part in parts) == (whole["message"]["content"] or "")
    assert [part["finish_reason"] for part in parts if part["finish_reason"]] == ["tool_calls"]
    assert [one for part in parts for one in part["logprobs"]["content"]] == whole["logprobs"]["content"]


def test_arguments_of_a_forced_call_are_streamed_as_they_come(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(text=CALL)) as client:
        told = events(chat(client, tools=TOOLS, tool_choice="required", max_tokens=100, stream=True))
    pieces = [
        part["delta"]["tool_calls"][0] for event in told for part in event["choices"] if "tool_calls" in part["delta"]
    ]
    assert len(pieces) == 1 + len('{"city": "Bern"}')


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_calls_stand_behind_reasoning(make_app: Callable[..., FastAPI], choice: str) -> None:
    body = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 120}
    with TestClient(make_app(text=CALL, reasoning_tokens=5)) as client:
        response = chat(client, **body).json()
        parts = [event["choices"][0]["delta"] for event in events(chat(client, **body, stream=True))]
    (whole,) = response["choices"]
    assert calls_of(whole) == [("weather", {"city": "Bern"})]
    assert whole["message"]["content"] is None
    assert response["usage"]["completion_tokens_details"]["reasoning_tokens"] == len("></think>") + 5
    assert len(whole["message"]["reasoning_content"]) == 5
    assert "".join(part.get("reasoning_content") or "" for part in parts) == whole["message"]["reasoning_content"]
    assert not any(part.get("content") for part in parts)


def test_tokens_of_calls_count(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(text=CALL)) as client:
        assert chat(client, tools=TOOLS, max_tokens=100).json()["usage"]["completion_tokens"] == len(CALL) + 1


@pytest.mark.parametrize(
    ("body", "param", "reason"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools.1.function.name", "'weather' is the name of tools.0 already"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "1 to 64 of a-z"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools.0.function.name", "1 to 64 of a-z"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name", "Field required"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0", "'custom' are not served"),
        ({"tools": [NOW] * 129}, "tools", "at most 128 items"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools.0.function.parameters",
            'its type may be "object" alone',
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"x": "y" * 70_000}}}]},
            "tools.0.function.parameters",
            "at most 65536 are allowed",
        ),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", 'must be "none", "auto", "required"'),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "now"}}, "tool_choice", "must be"),
        ({"tools": TOOLS, "tool_choice": allowed("none", "now")}, "tool_choice", "must be"),
        ({"tools": TOOLS, "tool_choice": allowed("auto")}, "tool_choice", "must be"),
        (
            {"tools": [WEATHER], "tool_choice": NAMED},
            "tool_choice",
            "'now' is no function of tools, which has weather",
        ),
        ({"tool_choice": "required"}, "tool_choice", "without tools only none and auto are allowed"),
        ({"tools": [], "tool_choice": NAMED}, "tool_choice", "without tools only none and auto are allowed"),
        (
            {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format",
            "tool_choice says that the text is calls",
        ),
        (
            {"tools": TOOLS, "guided_choice": ["a"]},
            "guided_choice",
            "not allowed with tools",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"pattern": "a+"}}}],
             "tool_choice": "required"},
            "tools.0.function.parameters",
            "regular expressions from requests are not run",
        ),
    ],
    ids=lambda value: str(value)[:48],
)  # fmt: skip
def test_tools_that_cannot_be_served_are_refused_by_field(
    client: TestClient, body: dict[str, Any], param: str, reason: str
) -> None:
    error = error_of(client, **body)
    assert error["param"] == param
    assert reason in error["message"]


def test_what_only_goes_into_the_prompt_may_hold_any_keyword(ask: Callable[..., dict[str, Any]]) -> None:
    loose = {"properties": {"x": {"type": "string", "pattern": "a+", "format": "odd"}}, "patternProperties": {}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": loose, "strict": False}}]
    assert calls_of(ask(CALL, tools=tools)) == [("weather", {"city": "Bern"})]


def test_a_schema_for_the_answer_goes_with_tools_that_are_not_forced(ask: Callable[..., dict[str, Any]]) -> None:
    assert calls_of(ask(CALL, response_format={"type": "json_object"})) == [("weather", {"city": "Bern"})]


def test_pinned_control_acts_in_calls_unless_it_says_otherwise(make_app: Callable[..., FastAPI]) -> None:
    pinned = {"objective": {"weights": {"positive": 1.0}}, "trace": True}
    for given, acts in ((pinned, True), ({**pinned, "in_calls": False}, False)):
        with TestClient(make_app(settings={"pinned_control": json.dumps(given)})) as client:
            body = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 80}
            assert ("control_trace" in chat(client, **body).json()["choices"][0]) == acts
            error = error_of(client, **body, control={"objective": {"weights": {"plain": 1.0}}, "in_calls": True})
            assert error["param"] == "control.in_calls"


def test_strict_is_refused_where_the_models_own_calls_cannot_be_held(make_app: Callable[..., FastAPI]) -> None:
    strict = {"type": "function", "function": {"name": "f", "strict": True}}
    with TestClient(make_app(call_format="gemma")) as client:
        error = error_of(client, tools=[NOW, strict])
        assert chat(client, tools=[NOW, strict], tool_choice="required", max_tokens=80).status_code == 200
    assert error["param"] == "tools.1.function.strict"
    assert "(gemma) are not JSON" in error["message"]


def test_a_model_whose_form_of_calls_is_not_known_takes_no_tools(make_app: Callable[..., FastAPI]) -> None:
    app = make_app()
    engine: FakeEngine = app.state.engine
    engine.info = type(engine.info)("fake", 4096, 256)
    with TestClient(app) as client:
        assert "tool_call_format" in error_of(client, tools=TOOLS)["message"]
        assert chat(client, tools=TOOLS, tool_choice="none", max_tokens=2).status_code == 200


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([HI, ANSWER], "messages.1.tool_call_id"),
        ([{"role": "assistant", "tool_calls": [call("a")]}, {"role": "tool", "tool_call_id": "b", "content": "4"}],
         "messages.1.tool_call_id"),
        ([{"role": "assistant", "tool_calls": [call("a")]}, HI, ANSWER],
         "messages.2.tool_call_id"),
        ([{"role": "assistant", "tool_calls": [call("a")]}, *[ANSWER] * 2],
         "messages.2.tool_call_id"),
        ([HI, {"role": "tool", "content": "4"}], "messages.1.tool_call_id"),
        ([{**HI, "tool_call_id": "a"}], "messages.0.tool_call_id"),
        ([{**HI, "tool_calls": [call("a")]}], "messages.0.tool_calls"),
        ([{"role": "assistant", "tool_calls": [call("")]}], "messages.0.tool_calls.0.id"),
        ([HI, {"role": "assistant", "tool_calls": [call("a"), call("b"), call("a")]}], "messages.1.tool_calls.2.id"),
        ([{"role": "assistant", "tool_calls": [{"id": "a", "type": "function"}]}], "messages.0.tool_calls.0.function"),
        ([{"role": "assistant", "tool_calls": [call("a")]}, {"role": "tool", "tool_call_id": "a"}],
         "messages.1.content"),
        ([HI, {"role": "function", "name": "f", "content": "4"}], "messages.1.role"),
    ],
    ids=lambda value: str(value)[-48:],
)  # fmt: skip
def test_messages_of_tools_that_fit_nothing_are_refused_by_field(
    client: TestClient, messages: list[Any], param: str
) -> None:
    assert error_of(client, messages=messages)["param"] == param


def test_tokenize_renders_tools_as_a_chat_does(client: TestClient) -> None:
    usage = chat(client, tools=TOOLS, messages=[HI], max_tokens=1).json()["usage"]
    assert client.post("/tokenize", json={"messages": [HI], "tools": TOOLS}).json()["count"] == usage["prompt_tokens"]
    error = client.post("/tokenize", json={"prompt": "hi", "tools": TOOLS}).json()["error"]
    assert error["message"] == "tools: only allowed with messages"


@pytest.fixture
def sdk(make_app: Callable[..., FastAPI]) -> Callable[..., Any]:
    def run(text: str, use: Callable[[openai.OpenAI], Any]) -> Any:
        with serving(make_app(text=text)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            return use(client)

    return run


OPTIONS: Any = {"model": "fake", "messages": [HI], "tools": TOOLS, "max_tokens": 300}


def test_the_openai_sdk_reads_calls_and_gives_them_back_with_their_answers(sdk: Callable[..., Any]) -> None:
    def use(client: openai.OpenAI) -> None:
        message = client.chat.completions.create(**OPTIONS).choices[0].message
        assert message.tool_calls is not None
        answers = [{"role": "tool", "tool_call_id": made.id, "content": "4 degrees"} for made in message.tool_calls]
        for given in (message, message.model_dump(), message.model_dump(exclude_none=True)):
            again: Any = [HI, given, *answers]
            assert client.chat.completions.create(**{**OPTIONS, "messages": again}).choices[0].message.tool_calls

    sdk(f"{CALL}\n{NEXT}", use)


def test_the_stream_helper_of_the_openai_sdk_adds_calls_up(sdk: Callable[..., Any]) -> None:
    def use(client: openai.OpenAI) -> ChatCompletion:
        with client.chat.completions.stream(**OPTIONS) as stream:
            kinds = {event.type for event in stream}
            assert "tool_calls.function.arguments.done" in kinds
            return stream.get_final_completion()

    choice = sdk(f"I look.\n{CALL}\n{NEXT}", use).choices[0]
    assert choice.message.content == "I look."
    assert [made.function.arguments for made in choice.message.tool_calls] == ['{"city": "Bern"}', "{}"]
    assert choice.finish_reason == "tool_calls"


def test_parse_of_the_openai_sdk_makes_objects_of_arguments(sdk: Callable[..., Any]) -> None:
    class Weather(BaseModel):
        city: str

    tool = openai.pydantic_function_tool(Weather, name="weather")
    options: Any = {**OPTIONS, "tools": [tool]}
    choice = sdk(CALL, lambda client: client.chat.completions.parse(**options)).choices[0]
    assert choice.message.tool_calls[0].function.parsed_arguments == Weather(city="Bern")
