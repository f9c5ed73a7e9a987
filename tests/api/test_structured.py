"""`response_format` over HTTP: what comes back holds the schema, and what cannot be served is refused by name."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jsonschema
import openai
import pytest
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from starlette.testclient import TestClient

from server.api.structure import MAX_LITERAL_CHARS, MAX_SCHEMA_CHARS, MAX_SCHEMA_DEPTH
from server.engines.embedded.structure import SchemaCompiler, SchemaMatcher
from server.errors import SchemaTooComplexError
from tests.api.conftest import chat, complete, serving
from tests.api.test_completions import joined

CONTROL = {"objective": {"weights": {"positive": 1.0, "plain": -0.5}}, "step_size": 2.0}
SCHEMA = {
    "title": "Review",
    "description": "What a guest thought.",
    "type": "object",
    "properties": {"liked": {"type": "boolean"}, "stars": {"enum": [1, 2, 3]}, "why": {"$ref": "#/$defs/Why"}},
    "required": ["liked", "stars", "why"],
    "additionalProperties": False,
    "$defs": {"Why": {"type": "string", "maxLength": 8}},
}


def held_to(schema: Any, **wrapper: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "review", "schema": schema, **wrapper}}


@pytest.fixture
def tiny(make_embedded_app: Callable[..., FastAPI]) -> Iterator[TestClient]:
    with TestClient(make_embedded_app()) as client:
        yield client


@pytest.mark.parametrize("control", [None, CONTROL], ids=["plain", "controlled"])
@pytest.mark.parametrize("send", [complete, chat])
def test_every_choice_holds_the_schema_streamed_or_not(
    tiny: TestClient, send: Callable[..., Any], control: dict[str, Any] | None
) -> None:
    for seed in range(4):
        body: dict[str, Any] = {
            "model": "tiny", "max_tokens": 100, "n": 2, "seed": seed, "response_format": held_to(SCHEMA, strict=True),
            "control": control, "presence_penalty": 0.5, "min_p": 0.01,
        }  # fmt: skip
        choices = send(tiny, **body).json()["choices"]
        texts = [choice["text"] if send is complete else choice["message"]["content"] for choice in choices]
        for text, choice in zip(texts, choices, strict=True):
            jsonschema.validate(json.loads(text), SCHEMA)
            assert choice["finish_reason"] == "stop"
            assert ("control" in choice) == (control is not None)
        assert joined(send(tiny, **body, stream=True)) == dict(enumerate(texts))


def test_a_json_object_may_hold_anything(tiny: TestClient) -> None:
    ended = []
    for seed in range(30):
        options = {"max_tokens": 60, "seed": seed, "temperature": 1.5, "logit_bias": {"92": 6}}
        choice = complete(tiny, model="tiny", response_format={"type": "json_object"}, **options).json()["choices"][0]
        assert choice["text"].startswith("{")
        if choice["finish_reason"] == "stop":
            ended.append(json.loads(choice["text"]))
    assert all(isinstance(value, dict) for value in ended)
    assert len(ended) >= 3


@pytest.mark.parametrize("send", [complete, chat])
def test_plain_text_is_what_comes_without_a_format(tiny: TestClient, send: Callable[..., Any]) -> None:
    answers = [
        send(tiny, model="tiny", seed=3, max_tokens=9, **given).json()["choices"]
        for given in ({}, {"response_format": None}, {"response_format": {"type": "text"}})
    ]
    assert answers[0] == answers[1] == answers[2]


def test_echo_and_log_probabilities_go_with_a_schema(tiny: TestClient) -> None:
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 100, "seed": 1, "echo": True, "logprobs": 2}
    (choice,) = complete(tiny, response_format=held_to(SCHEMA), **options).json()["choices"]
    assert choice["text"].startswith("hello{")
    jsonschema.validate(json.loads(choice["text"].removeprefix("hello")), SCHEMA)
    assert choice["logprobs"]["tokens"][:6] == list("hello{")
    assert choice["logprobs"]["tokens"][-1] == "<eos>"


DEEP: Any = {"type": "integer"}
for _ in range(MAX_SCHEMA_DEPTH):
    DEEP = {"items": DEEP}
FIELD = "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("response_format", "param", "message"),
    [
        ("json_object", "response_format", ""),
        ({}, "response_format.type", ""),
        ({"type": "regex", "regex": "(a+)+$"}, "response_format.type", "'json_schema'"),
        ({"type": "grammar", "grammar": "start: /a+/"}, "response_format.type", ""),
        ({"type": "json_object", "schema": {}}, "response_format.schema", "no such field"),
        ({"type": "json_schema"}, "response_format.json_schema", "required"),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, FIELD, "required"),
        ({"type": "json_schema", "json_schema": {"schema": {}}}, "response_format.json_schema.name", "required"),
        (held_to({}, name="no spaces"), "response_format.json_schema.name", ""),
        (held_to({}, regex="a"), "response_format.json_schema.regex", "Allowed here: name, description, schema"),
        (held_to([]), FIELD, ""),
        (held_to(True), FIELD, ""),
        (held_to({"type": "string", "pattern": "(a+)+$"}), FIELD, "pattern: regular expressions"),
        (held_to({"anyOf": [{"items": [{"patternProperties": {}}]}]}), FIELD, "patternProperties: regular"),
        (held_to({"properties": {"const": {"pattern": "a"}}}), FIELD, "pattern: regular"),
        (held_to({"x-guidance": {"lenient": True}}), FIELD, "x-guidance"),
        (held_to({"type": "integer", "multipleOf": 999983}), FIELD, "multipleOf"),
        (held_to({"$ref": "#/default", "default": {"pattern": "a+"}}), FIELD, "$ref"),
        (held_to({"$ref": "#/$defs/a%2Fdefault", "$defs": {"a": {"default": {"pattern": "a+"}}}}), FIELD, "$ref"),
        (held_to({"$ref": "http://127.0.0.1/"}), FIELD, "$ref"),
        (held_to({"$ref": 1}), FIELD, "$ref"),
        (held_to(DEEP), FIELD, f"more than {MAX_SCHEMA_DEPTH} deep"),
        (held_to({"description": "x" * MAX_SCHEMA_CHARS}), FIELD, f"at most {MAX_SCHEMA_CHARS}"),
        (held_to({"const": ["x" * (MAX_LITERAL_CHARS + 1)]}), FIELD, f"{MAX_LITERAL_CHARS} characters"),
        (held_to({"properties": {"x" * (MAX_LITERAL_CHARS + 1): {}}}), FIELD, f"{MAX_LITERAL_CHARS} characters"),
        (held_to({"type": "strin"}), FIELD, "Invalid type"),
        (held_to({"not": {}}), FIELD, "#/not: this keyword"),
        (held_to({"const": "\\ud800"}), FIELD, ""),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_format_that_cannot_be_served_is_refused_by_its_path_and_nothing_is_queued(
    tiny: TestClient, response_format: Any, param: str, message: str
) -> None:
    # As it is, since httpx would not send half a surrogate pair.
    body = json.dumps({"model": "tiny", "prompt": "hi", "response_format": response_format}).replace("\\\\ud", "\\ud")
    response = tiny.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"] == param
    assert message in error["message"]
    assert len(error["message"]) < 500
    assert complete(tiny, model="tiny", max_tokens=1).status_code == 200


@pytest.mark.parametrize("send", [complete, chat])
@pytest.mark.parametrize(
    "asked",
    [{"guided_json": SCHEMA}, {"guided_json": json.dumps(SCHEMA)}, {"structured_outputs": {"json": SCHEMA}},
     {"structured_outputs": {"json": SCHEMA, "choice": None, "regex": None}, "response_format": {"type": "text"}}],
    ids=["guided", "as a string", "structured", "with nulls"],
)  # fmt: skip
def test_a_schema_may_come_in_vllms_fields(tiny: TestClient, send: Callable[..., Any], asked: dict[str, Any]) -> None:
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 100, "seed": 3}
    same = send(tiny, response_format=held_to(SCHEMA), **options).json()["choices"]
    assert send(tiny, **asked, **options).json()["choices"] == same


def test_beside_tools_a_schema_for_the_answer_is_refused_by_its_own_field(tiny: TestClient) -> None:
    none: dict[str, Any] = {"type": "object", "properties": {"a": False}, "required": ["a"]}
    tools = [{"type": "function", "function": {"name": "f"}}]
    for asked, param in (
        ({"response_format": held_to(none)}, "response_format.json_schema.schema"),
        ({"guided_json": none}, "guided_json"),
    ):
        error = chat(tiny, model="tiny", tools=tools, **asked).json()["error"]
        assert error["param"] == param
        assert error["message"].startswith(f"{param}: Unsatisfiable schema")


@pytest.mark.parametrize("field", ["guided_choice", "structured_outputs"])
def test_a_text_may_be_held_to_choices(tiny: TestClient, field: str) -> None:
    choices = ["yes", "no", "no way", 'a "quoted" line\n', "é😀", "<bos>"]
    asked = {field: choices if field == "guided_choice" else {"choice": choices}}
    seen = set()
    for seed in range(20):
        options: dict[str, Any] = {"seed": seed, "max_tokens": 40, "temperature": 2}
        (choice,) = complete(tiny, model="tiny", **options, **asked).json()["choices"]
        assert choice["finish_reason"] == "stop"
        seen.add(choice["text"])
    assert seen <= set(choices)
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("asked", "param", "message"),
    [
        ({"guided_regex": "(a+)+$"}, "guided_regex", "regular expressions from requests are not run"),
        ({"guided_grammar": "start: /a/"}, "guided_grammar", "grammars from requests are not run"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs.regex", "regular expressions"),
        ({"structured_outputs": {"grammar": "a"}}, "structured_outputs.grammar", "grammars"),
        ({"structured_outputs": {}}, "structured_outputs", "one of json, choice, json_object"),
        ({"structured_outputs": {"choice": ["a"], "json": {}}}, "structured_outputs", "one of json, choice"),
        ({"structured_outputs": {"jsn": {}}}, "structured_outputs.jsn", "no such field"),
        ({"structured_outputs": {"json": {"pattern": "a"}}}, "structured_outputs.json", "pattern: regular"),
        ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs.json", "#/not: this keyword"),
        ({"guided_json": "{"}, "guided_json", "as a string that holds one"),
        ({"guided_json": "[]"}, "guided_json", ""),
        ({"guided_choice": []}, "guided_choice", ""),
        ({"guided_choice": ["a", ""]}, "guided_choice.1", ""),
        ({"guided_choice": ["x" * 500] * 100}, "guided_choice", "50000 characters"),
        ({"guided_choice": ["a"], "guided_json": {}}, "guided_choice", "guided_json says already"),
        ({"guided_json": {}, "response_format": {"type": "json_object"}}, "guided_json", "response_format says"),
        ({"guided_choice": ["a"], "ignore_eos": True}, "ignore_eos", "where the text ends"),
    ],
)
def test_a_structure_in_vllms_fields_that_cannot_be_served_is_refused_by_its_field(
    tiny: TestClient, asked: dict[str, Any], param: str, message: str
) -> None:
    response = complete(tiny, model="tiny", **asked)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert message in error["message"]


def test_keywords_are_told_from_names_and_values_that_look_like_them(tiny: TestClient) -> None:
    """A property may be called `pattern`, and a value may hold the word."""
    schema = {
        "type": "object",
        "properties": {"pattern": {"type": "boolean"}, "multipleOf": {"const": {"pattern": "a"}}},
        "required": ["pattern", "multipleOf"],
        "default": {"pattern": 1},
        "additionalProperties": False,
    }
    response = complete(tiny, model="tiny", max_tokens=100, response_format=held_to(schema))
    assert json.loads(response.json()["choices"][0]["text"])["multipleOf"] == {"pattern": "a"}


def test_a_text_that_comes_to_a_limit_of_its_schema_is_a_400_that_names_the_field(
    tiny: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = SchemaMatcher.advance

    def fail_at_the_third(self: SchemaMatcher, token_id: int) -> None:
        if self.num_tokens == 2:
            raise SchemaTooComplexError("the text has come where the schema allows too much at once")
        works(self, token_id)

    monkeypatch.setattr(SchemaMatcher, "advance", fail_at_the_third)
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 20, "response_format": held_to(SCHEMA)}
    field = "response_format.json_schema.schema"
    answer = complete(tiny, **body)
    events = [line.removeprefix("data: ") for line in complete(tiny, **body, stream=True).text.splitlines() if line]
    for status, error in ((answer.status_code, answer.json()["error"]), (400, json.loads(events[-2])["error"])):
        assert (status, error["type"], error["code"]) == (400, "invalid_request_error", "schema_too_complex")
        assert (error["param"], error["message"][: len(field)]) == (field, field)


def test_ignore_eos_cannot_go_with_a_format(tiny: TestClient) -> None:
    error = complete(tiny, model="tiny", ignore_eos=True, response_format=held_to(SCHEMA)).json()["error"]
    assert error["param"] == "ignore_eos"


def test_a_server_that_cannot_says_why(client: TestClient, tiny: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    for response, reason in (
        (complete(client, response_format={"type": "json_object"}), "fake engine"),
        (chat(tiny, model="tiny", response_format={"type": "json_object"}), "recontrol[structured]"),
    ):
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "response_format")
        assert error["code"] == "unsupported_field"
        assert reason in error["message"]


def test_a_schema_is_compiled_beside_the_event_loop_and_before_anything_is_queued(
    tiny: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, engine = [], tiny.app.state.engine  # type: ignore[attr-defined]
    works = SchemaCompiler.compile

    def watched(self: SchemaCompiler, schema: str) -> Any:
        status = engine.status()
        compiled.append((threading.current_thread().name, status.num_running + status.num_waiting))
        return works(self, schema)

    monkeypatch.setattr(SchemaCompiler, "compile", watched)
    assert complete(tiny, model="tiny", response_format=held_to(SCHEMA), prompt=["a", "b"]).status_code == 200
    ((thread, num_queued),) = compiled
    assert thread.startswith("recontrol-schema_")
    assert num_queued == 0


class Guest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=5)
    nights: Literal[1, 2, 3]


class Booking(BaseModel):
    guests: list[Guest] = Field(min_length=1, max_length=2)
    is_paid: bool
    note: str | None = Field(max_length=4)


def test_the_openai_sdk_parses_into_pydantic_models(make_embedded_app: Callable[..., FastAPI]) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    options: Any = {"model": "tiny", "messages": messages, "max_tokens": 200, "extra_body": {"control": CONTROL}}
    with serving(make_embedded_app()) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as sdk:
        parsed = sdk.chat.completions.parse(response_format=Booking, seed=1, **options).choices[0].message.parsed
        assert isinstance(parsed, Booking)
        with sdk.chat.completions.stream(response_format=Booking, seed=1, **options) as stream:
            assert stream.get_final_completion().choices[0].message.parsed == parsed
        loose = sdk.chat.completions.create(response_format=held_to(SCHEMA), seed=2, **options)
        jsonschema.validate(json.loads(loose.choices[0].message.content or ""), SCHEMA)
        with pytest.raises(openai.LengthFinishReasonError):
            sdk.chat.completions.parse(response_format=Booking, **{**options, "max_tokens": 3})
        with pytest.raises(openai.BadRequestError, match="pattern: regular expressions"):
            sdk.chat.completions.create(response_format=held_to({"pattern": "a"}), **options)
