"""POST /v1/responses over HTTP: every event as OpenAI's SDK knows it, what input may hold, and errors by field."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from starlette.testclient import TestClient

from server.api.messages import ChatMessage
from server.api.responses.body import ResponseBody
from server.errors import InvalidRequestError
from tests.api.conftest import chat, respond

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
CONTROL = {"objective": {"weights": {"positive": 1.0}}, "trace": True}
LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
QUESTION = {"role": "user", "content": "hello"}
ANSWER = {
    "id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
    "content": [{"type": "output_text", "text": "good day", "annotations": [], "logprobs": []}],
}  # fmt: skip


def events_of(client: TestClient, **body: Any) -> list[dict[str, Any]]:
    """Each of them as the SDK has it, in its own order, and under its name."""
    lines = respond(client, stream=True, **body).text.split("\n\n")
    assert lines.pop() == ""
    events = []
    for line in lines:
        name, _, data = line.partition("\n")
        event = json.loads(data.removeprefix("data: "))
        EVENTS.validate_python(event)
        assert name == f"event: {event['type']}"
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def asked_of(client: TestClient, **body: Any) -> list[str]:
    """The prompt's lines, as the fake engine renders a chat."""
    prompts: list[str] = []
    engine: Any = client.app.state.engine  # type: ignore[attr-defined]
    encode = engine.encode
    engine.encode = lambda text, **options: prompts.append(text) or encode(text, **options)
    try:
        assert respond(client, max_output_tokens=1, **body).status_code == 200
    finally:
        engine.encode = encode
    return prompts[0].splitlines()


def without_what_differs(response: dict[str, Any]) -> dict[str, Any]:
    """Ids and times."""
    output = [{**item, "id": ""} for item in response["output"]]
    return {**response, "id": "", "created_at": 0, "completed_at": 0, "output": output}


def test_a_response_is_one_as_the_sdk_has_it_and_says_what_was_done(client: TestClient) -> None:
    body = respond(client, instructions="be kind", max_output_tokens=5, temperature=0.5, metadata={"a": "b"}).json()
    response = Response.model_validate(body)
    assert len(response.output_text) == 5
    assert (response.instructions, response.temperature, response.metadata) == ("be kind", 0.5, {"a": "b"})
    assert body["store"] is False
    assert response.usage is not None
    assert response.usage.output_tokens == 5
    assert response.usage.total_tokens == response.usage.input_tokens + 5


def test_a_response_is_the_chats_text(client: TestClient) -> None:
    message = chat(client, seed=1, max_tokens=5).json()["choices"][0]["message"]
    assert (
        Response.model_validate(respond(client, seed=1, max_output_tokens=5).json()).output_text == message["content"]
    )


@pytest.mark.parametrize(
    "body",
    [{}, {"control": CONTROL}, LOGPROBS, {"stop": ["e", "a"]}, {"max_output_tokens": 1}, {"logit_bias": {"0": 1}}],
    ids=str,
)
def test_what_is_streamed_ends_in_the_response_that_is_not(client: TestClient, body: dict[str, Any]) -> None:
    asked = {"seed": 1, "max_output_tokens": 6, **body}
    whole = respond(client, **asked).json()
    events = events_of(client, **asked)
    assert without_what_differs(events[-1]["response"]) == without_what_differs(whole)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    part = whole["output"][0]["content"][0]
    assert "".join(event["delta"] for event in deltas) == part["text"]
    assert [score for event in deltas for score in event["logprobs"]] == part["logprobs"]
    assert [step for event in deltas for step in event.get("control_trace", [])] == whole.get("control_trace", [])


def test_events_come_in_the_order_in_which_openai_sends_them(client: TestClient) -> None:
    kinds = [event["type"].removeprefix("response.") for event in events_of(client, max_output_tokens=2)]
    assert kinds == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "incomplete",
    ]  # fmt: skip


def test_a_response_without_a_text_holds_an_empty_message(client: TestClient) -> None:
    asked = {"stop": list("etaoin shrdlu"), "max_output_tokens": 9}
    whole = respond(client, **asked).json()
    assert (whole["status"], whole["output"][0]["content"][0]["text"]) == ("completed", "")
    assert whole["completed_at"] >= whole["created_at"]
    assert without_what_differs(events_of(client, **asked)[-1]["response"]) == without_what_differs(whole)


def test_what_is_cut_off_is_incomplete_and_says_why(client: TestClient) -> None:
    cut = respond(client, max_output_tokens=3).json()
    assert (cut["status"], cut["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert cut["output"][0]["status"] == "incomplete"


def test_control_is_told_beside_the_output_as_a_chat_tells_it(client: TestClient) -> None:
    told = respond(client, seed=1, max_output_tokens=3, control=CONTROL).json()
    choice = chat(client, seed=1, max_tokens=3, control=CONTROL).json()["choices"][0]
    assert (told["control"], told["control_trace"]) == (choice["control"], choice["control_trace"])
    assert "control" not in respond(client, max_output_tokens=3).json()
    assert respond(client, model="fake@plain", max_output_tokens=3).json()["control"]["value_after"] == {"plain": 0.5}


def test_a_stream_that_fails_ends_in_a_failed_response(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(fail_after=2)) as client:
        *_, before, last = events_of(client, max_output_tokens=9)
        assert respond(client, max_output_tokens=9).status_code == 500
    assert before["type"] == "response.output_text.delta"
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["code"] == "server_error"
    assert "failed as told" in last["response"]["error"]["message"]
    assert len(last["response"]["output"][0]["content"][0]["text"]) == 2


def test_a_stream_that_fails_before_its_first_token_has_no_output(client: TestClient) -> None:
    engine: Any = client.app.state.engine  # type: ignore[attr-defined]
    engine._token_delay_s = 0.2
    *_, last = events_of(client, timeout_s=0.05)
    assert (last["type"], last["response"]["output"]) == ("response.failed", [])
    error = last["response"]["error"]
    assert error["code"] == "server_error"
    assert "not complete after" in error["message"]


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        ("hello", ["user: hello"]),
        ([QUESTION], ["user: hello"]),
        ([{"type": "message", **QUESTION}], ["user: hello"]),
        ([{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}], ["user: hello"]),
        ([QUESTION, ANSWER, QUESTION], ["user: hello", "assistant: good day", "user: hello"]),
        ([QUESTION, {**ANSWER, "id": None, "status": None, "phase": "final_answer"}, QUESTION],
         ["user: hello", "assistant: good day", "user: hello"]),
        ([QUESTION, {"role": "assistant", "content": "good day"}, QUESTION],
         ["user: hello", "assistant: good day", "user: hello"]),
        ([{"role": "developer", "content": "be kind"}, QUESTION], ["developer: be kind", "user: hello"]),
        ([QUESTION, {"id": "rs_1", "type": "reasoning", "summary": []}, ANSWER, QUESTION],
         ["user: hello", "assistant: good day", "user: hello"]),
        ([QUESTION, {**ANSWER, "status": "incomplete"}], ["user: hello", "assistant: good day"]),
        ([QUESTION, {**ANSWER, "content": [{"type": "refusal", "refusal": "no"}]}, QUESTION],
         ["user: hello", "assistant: no", "user: hello"]),
    ],
    ids=str,
)  # fmt: skip
def test_input_is_the_chat_that_its_items_are(client: TestClient, given: Any, lines: list[str]) -> None:
    assert asked_of(client, input=given) == lines
    assert asked_of(client, input=given, instructions="be brief") == ["system: be brief", *lines]


def test_a_response_may_be_asked_for_by_instructions_alone(client: TestClient) -> None:
    assert asked_of(client, input=[], instructions="greet") == ["system: greet"]


def test_past_reasoning_goes_to_the_template_with_the_answer_that_follows_it() -> None:
    body = ResponseBody.model_validate({
        "model": "m",
        "input": [
            QUESTION,
            {"id": "rs_1", "type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            ANSWER,
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]},
            QUESTION,
        ],
    })  # fmt: skip
    assert ChatMessage.plain(body.messages) == [
        QUESTION,
        {"role": "assistant", "content": "good day", "reasoning_content": "hm"},
        {"role": "assistant", "content": "", "reasoning_content": "so"},
        QUESTION,
    ]


def test_reasoning_is_an_item_before_the_message_streamed_as_whole(make_app: Callable[..., FastAPI]) -> None:
    asked = {"seed": 1, "max_output_tokens": 40, "control": {**CONTROL, "phase": "reasoning"}, **LOGPROBS}
    with TestClient(make_app(reasoning_tokens=5)) as client:
        whole = respond(client, **asked).json()
        events = events_of(client, **asked)
        assert respond(client, input=[QUESTION, *whole["output"], QUESTION]).status_code == 200
    told = [(item.type, item.to_dict()["status"]) for item in Response.model_validate(whole).output]
    assert told == [("reasoning", "completed"), ("message", "incomplete")]
    assert without_what_differs(events[-1]["response"]) == without_what_differs(whole)
    deltas = [event["delta"] for event in events if event["type"] == "response.reasoning_text.delta"]
    assert "".join(deltas) == whole["output"][0]["content"][0]["text"]
    assert len("".join(deltas)) == 5
    (part,) = whole["output"][1]["content"]
    assert "".join(score["token"] for score in part["logprobs"]) == part["text"]


def test_reasoning_is_counted_and_controlled_as_a_chats_is(make_app: Callable[..., FastAPI]) -> None:
    control = {**CONTROL, "phase": "reasoning"}
    with TestClient(make_app(reasoning_tokens=5)) as client:
        told = respond(client, max_output_tokens=40, control=control).json()
        chatted = chat(client, max_tokens=40, control=control).json()
    details = chatted["usage"]["completion_tokens_details"]
    assert told["usage"]["output_tokens_details"]["reasoning_tokens"] == details["reasoning_tokens"] > 5
    assert told["control"] == chatted["choices"][0]["control"]
    assert len(told["control_trace"]) == len(chatted["choices"][0]["control_trace"]) < 40


def test_the_events_of_reasoning_come_before_those_of_the_message(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(reasoning_tokens=1)) as client:
        events = events_of(client, max_output_tokens=17)
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds == [
        "created", "in_progress", "output_item.added", "content_part.added", "reasoning_text.delta",
        "reasoning_text.done", "content_part.done", "output_item.done", "output_item.added", "content_part.added",
        "output_text.delta", "output_text.done", "content_part.done", "output_item.done", "incomplete",
    ]  # fmt: skip


def test_a_response_that_is_cut_off_while_it_reasons_has_no_message(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(reasoning_tokens=50)) as client:
        cut = respond(client, max_output_tokens=20).json()
    assert [(item["type"], item["status"]) for item in cut["output"]] == [("reasoning", "incomplete")]
    assert cut["incomplete_details"] == {"reason": "max_output_tokens"}


@pytest.mark.parametrize(
    ("fields", "continues"),
    [
        ({"input": [QUESTION, {**ANSWER, "status": "incomplete"}]}, True),
        ({"input": [QUESTION, {**ANSWER, "status": "in_progress"}]}, True),
        ({"input": [QUESTION, ANSWER]}, False),
        ({"input": [QUESTION, ANSWER], "continue_final_message": True}, True),
        ({"input": [QUESTION, {**ANSWER, "status": "incomplete"}], "add_generation_prompt": True}, False),
        ({"input": [QUESTION, {**ANSWER, "status": "incomplete"}], "continue_final_message": False}, False),
        ({"input": [{**ANSWER, "status": "incomplete"}, QUESTION]}, False),
    ],
    ids=str,
)
def test_an_answer_that_is_unfinished_and_comes_last_is_continued(fields: dict[str, Any], continues: bool) -> None:
    rendering = ResponseBody.model_validate({"model": "m", **fields}).chat_rendering()
    assert (rendering.continue_final_message, rendering.add_generation_prompt) == (continues, not continues)


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({"input": 3}, "input", "string or a list of items"),
        ({"input": []}, "input", "must hold an item"),
        ({"input": [3]}, "input.0", "should be an object"),
        ({"input": [QUESTION, {"type": "web_search_call", "id": "ws_1"}]}, "input.1.type", "web_search_call"),
        ({"input": [{"type": "x" * 99}]}, "input.0.type", "message, function_call"),
        ({"input": [{"id": "msg_1"}]}, "input.0.type", "give the item itself"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0.type", "no response is stored"),
        ({"input": [{"role": "user"}]}, "input.0.content", "must be a string or a list"),
        ({"input": [{"role": "boss", "content": "x"}]}, "input.0.role", "'assistant'"),
        ({"input": [{"role": "user", "content": "x", "mood": 1}]}, "input.0.mood", "no such field"),
        ({"input": [{**ANSWER, "status": "done"}]}, "input.0.status", "'completed'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content",
         "parts of type 'input_image'"),
        ({"input": [{"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA"}]},
         "input.0.encrypted_content", "cannot be read here"),
        ({"input": [QUESTION] * 1025}, "input", "at most 1024"),
        ({"input": "\ud800"}, "input.0.content.0.text", "surrogates"),
        ({"instructions": 3}, "instructions", "string"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than"),
        ({"max_output_tokens": 4096}, "max_output_tokens", "max_output_tokens is 4096"),
        ({"max_tokens": 3}, "max_tokens", "max_output_tokens"),
        ({"messages": [QUESTION]}, "messages", "/v1/chat/completions"),
        ({"n": 2}, "n", "ask several times"),
        ({"nope": 2}, "nope", "no such field"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type", "'json_schema'"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"pattern": "a"}}}}, "text.format.schema",
         "regular expressions"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {}}}}, "text.format.schema", "fake engine"),
        ({"text": {"format": {"type": "json_object"}}, "structured_outputs": {"json": {}}}, "structured_outputs",
         "text.format says already"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format", "fake engine"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "medium"),
        ({"include": ["everything"]}, "include.0", "message.output_text.logprobs"),
        ({"top_logprobs": 3}, "top_logprobs", "include"),
        ({"top_logprobs": 21, "include": LOGPROBS["include"]}, "top_logprobs", "less than or equal to 20"),
        ({"reasoning": {"effort": "most"}}, "reasoning.effort", "'high'"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary", "not summarised"),
        ({"reasoning": {"tokens": 3}}, "reasoning.tokens", "no such field"),
        ({"stream_options": {}}, "stream_options", "stream: true"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation",
         "not padded"),
        ({"continue_final_message": True}, "continue_final_message", "assistant's"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_served_is_refused_by_its_field(
    client: TestClient, body: dict[str, Any], field: str, message: str
) -> None:
    content = json.dumps({"model": "fake", "input": "hello", **body}).encode()
    response = client.post("/v1/responses", content=content, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, field)
    assert message in error["message"]
    assert len(error["message"]) < 900
    assert respond(client, max_output_tokens=1).status_code == 200


@pytest.mark.parametrize(
    ("named", "param"),
    [("messages", "input"), ("reasoning_effort", "reasoning.effort"), ("response_format", "text.format"), ("x", "x")],
)
def test_what_an_engine_refuses_is_named_as_a_response_has_it(client: TestClient, named: str, param: str) -> None:
    def refuse(*_: object) -> None:
        raise InvalidRequestError(f"{named}: the template refuses it", param=named)

    client.app.state.engine.encode_chat = refuse  # type: ignore[attr-defined]
    error = respond(client).json()["error"]
    assert (error["param"], error["message"]) == (param, f"{param}: the template refuses it")


@pytest.mark.parametrize(
    "fields",
    [
        {"include": [], "tools": [], "parallel_tool_calls": False, "tool_choice": "auto", "store": False},
        {"text": {"format": {"type": "text"}, "verbosity": "medium"}, "truncation": "disabled", "background": False},
        {"reasoning": {"effort": None, "summary": "auto"}, "include": ["reasoning.encrypted_content"]},
        {"stream_options": None, "previous_response_id": None, "conversation": None, "prompt": None},
        {"max_tool_calls": 3, "service_tier": "auto", "prompt_cache_key": "k", "safety_identifier": "s", "user": "u"},
    ],
    ids=str,
)
def test_what_clients_add_changes_no_text(client: TestClient, fields: dict[str, Any]) -> None:
    asked = {"seed": 1, "max_output_tokens": 3}
    plain = without_what_differs(respond(client, **asked).json())["output"]
    response = respond(client, **asked, **fields)
    assert without_what_differs(response.json())["output"] == plain, response.text


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel")],
)
def test_what_is_asked_of_a_stored_response_is_told_that_none_is(client: TestClient, method: str, path: str) -> None:
    response = client.request(method, f"/v1/responses/resp_1{path}", json={} if method == "POST" else None)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"]) == (404, "not_found_error", "not_found")
    assert "none is stored" in error["message"]


def test_embeddings_are_refused_with_what_is_nearest(client: TestClient) -> None:
    response = client.post("/v1/embeddings", json={"model": "fake", "input": "x"})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (404, "unsupported_path")
    assert "/v1/value" in error["message"]


def test_both_routes_need_a_key(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(settings={"api_keys": "Key-0123456789abcdef"})) as client:
        assert respond(client).status_code == 401
        assert client.get("/v1/responses/resp_1").status_code == 401
        assert client.post("/v1/embeddings", json={}).status_code == 401


def test_a_minutes_tokens_are_charged_as_a_chats_are(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(settings={"tokens_per_minute": 60})) as client:
        error = respond(client, max_output_tokens=100).json()["error"]
        assert error["param"] == "max_output_tokens"
        # What was refused had been read, for a token.
        assert respond(client).json()["usage"]["total_tokens"] == 59
        assert respond(client).status_code == 429
