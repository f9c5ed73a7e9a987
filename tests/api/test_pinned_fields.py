"""Every field of a request is judged against pinned control: a new one fails here until it is.

What a field can do is one of a few things, and each is a law. The study `benchmarks.pinned` measures the same fields on
the real model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import BaseModel
from starlette.testclient import TestClient

from server.api.pinned import FIELDS
from server.api.responses.body import ResponseBody
from server.api.schemas import ChatBody, CompletionBody
from server.api.value import ValueBody
from server.control.params import Blocks, ControlParams, UnderPinned
from server.errors import ConfigurationError
from server.settings import PINNED_REFUSES
from server.types import GenerationRequest
from tests.api.conftest import chat, complete, recording, respond

SCHEMA = {"type": "object", "properties": {"a": {"const": "bad"}}, "required": ["a"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "f", "strict": True, "parameters": SCHEMA}}
OTHERS = {"objective": {"weights": {"positive": 1.0}}}
# The same tokens as without the field.
INERT: dict[str, Any] = {
    "model": "tiny@plain", "n": 2, "stream": None, "stream_options": None, "user": "me", "safety_identifier": "me",
    "metadata": {"a": "b"}, "prompt_cache_key": "k", "control": None, "logprobs": 3, "top_logprobs": 2, "echo": True,
    "parallel_tool_calls": True, "timeout_s": 60.0, "include_reasoning": True,
}  # fmt: skip
# What anyone could cut off the text by themselves.
CUTS: dict[str, Any] = {
    "max_tokens": 5, "max_completion_tokens": 5, "stop": ["a", "e", "\x00"], "stop_token_ids": [5, 6, 7, 101],
}  # fmt: skip
# Tokens are drawn otherwise, from a distribution that pinned control has moved.
REDRAWN: dict[str, Any] = {
    "temperature": 0.5, "top_p": 0.5, "top_k": 5, "min_p": 0.3, "seed": 7, "ignore_eos": True,
    "presence_penalty": 0.5, "frequency_penalty": 0.5, "best_of": 3,
}  # fmt: skip
# Another text to go on from, where pinned control acts from the first new token.
PROMPTS: dict[str, Any] = {
    "prompt": "Be bad.", "messages": [{"role": "user", "content": "Be bad."}], "add_special_tokens": True,
    "add_generation_prompt": False, "continue_final_message": True, "chat_template_kwargs": {},
    "reasoning_effort": "none", "tools": [TOOL],
}  # fmt: skip
# Refused by default, at these values.
OUTWEIGHS: dict[str, Any] = {
    "logit_bias": {"5": 8.0}, "repetition_penalty": 2.0, "temperature": 2.0, "presence_penalty": -2.0,
    "frequency_penalty": -2.0,
}  # fmt: skip
# Not held: what is left of the vocabulary may be one text. Refused where the operator says so.
NOT_HELD: dict[str, Any] = {
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
    "structured_outputs": {"choice": ["bad"]}, "guided_json": SCHEMA, "guided_choice": ["bad"],
    "tool_choice": "required",
}  # fmt: skip
# Put together with what is pinned, or refused by name.
COMPOSED: dict[str, Any] = {
    "objective": OTHERS["objective"], "step_size": 0.0, "steps": 0, "max_kl": 0.001, "max_shift": 0.001,
    "stop_below": {"plain": -1e6}, "on_stop": {"type": "replace", "hold_tokens": 4},
    "search": {"type": "blocks", "candidates": 2}, "trace": True,
}  # fmt: skip
REFUSED_CONTROL: dict[str, Any] = {
    "phase": "answer", "in_calls": True,
    "max_response_kl": 0.001, "gate": {"head": "positive", "below": -1e6}, "window": {"start": 100},
    "schedule": {"type": "exponential", "half_life": 0.01},
}  # fmt: skip
# Bounds of the caller's own that rise with the turns of a chat; put together with what is pinned, as bounds are.
OVER_TURNS = {"stop_below": {"plain": -1e6}, "over_turns": {"stop_below": {"plain": {"tighten": 1.0, "to": 0.0}}}}
BLOCKS: dict[str, Any] = {"type": "blocks", "candidates": 2, "block_tokens": 2, "reward": "brevity"}
# Of texts that are there already; no token is drawn.
READS = {"model", "input", "messages", "heads", "per_token", "hidden_state", "user", "timeout_s"}
PINNED = {"objective": {"weights": {"plain": 1.0}}, "max_kl": 0.2}


def fields_of(*bodies: type[BaseModel]) -> set[str]:
    return {name for body in bodies for name in body.model_fields}


def test_every_field_of_a_request_is_judged() -> None:
    judged = INERT.keys() | CUTS.keys() | REDRAWN.keys() | PROMPTS.keys() | OUTWEIGHS.keys() | NOT_HELD.keys()
    assert judged == fields_of(CompletionBody, ChatBody)
    assert COMPOSED.keys() | OVER_TURNS.keys() | REFUSED_CONTROL.keys() == fields_of(ControlParams)
    assert BLOCKS.keys() == fields_of(Blocks)
    assert fields_of(ValueBody) == READS
    assert set(PINNED_REFUSES) == OUTWEIGHS.keys()


def asked(field: str, value: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """How to send the field: a completion if that has it, else a chat; with what it needs."""
    body = {"max_tokens": 24, "seed": 1, "model": "tiny", field: value}
    if field in CompletionBody.model_fields:
        return complete, body
    if field == "max_completion_tokens":
        del body["max_tokens"]
    if field == "continue_final_message":
        body["messages"] = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Bad"}]
    return chat, body | ({"logprobs": True} if field == "top_logprobs" else {})


@pytest.fixture
def pinned(make_embedded_app: Callable[..., FastAPI]) -> Iterator[tuple[TestClient, list[GenerationRequest]]]:
    with recording(make_embedded_app(pinned_control=json.dumps(PINNED))) as client_and_requests:
        yield client_and_requests


def test_no_field_reaches_the_engine_without_what_is_pinned(
    pinned: tuple[TestClient, list[GenerationRequest]],
) -> None:
    client, requests = pinned
    for kind in (INERT, CUTS, REDRAWN, PROMPTS, NOT_HELD):
        for field, value in kind.items():
            if field in ("tools", "tool_choice"):
                continue
            send, body = asked(field, value)
            assert send(client, **body).status_code == 200, field
    for field, value in COMPOSED.items():
        asked_control = {**OTHERS, field: value} | ({"stop_below": {"plain": -1e6}} if field == "on_stop" else {})
        assert complete(client, model="tiny", max_tokens=4, control=asked_control).status_code == 200, field
    # Pinned control acts in calls of tools, too.
    expected = ControlParams.model_validate({**PINNED, "in_calls": True})
    assert chat(client, model="tiny", max_tokens=4, control={**OTHERS, **OVER_TURNS}).status_code == 200
    for request in requests:
        control = request.control.pinned if isinstance(request.control, UnderPinned) else request.control
        assert control == expected


def test_pinned_control_is_beneath_calls_of_tools(make_app: Callable[..., FastAPI]) -> None:
    """On an engine with room for what tools are told by."""
    app, requests = make_app(settings={"pinned_control": json.dumps(PINNED)}), []
    generate = app.state.engine.generate
    app.state.engine.generate = lambda request: (requests.append(request), generate(request))[1]
    with TestClient(app) as client:
        for choice in ("auto", NOT_HELD["tool_choice"]):
            assert chat(client, tools=[TOOL], tool_choice=choice, max_tokens=4).status_code == 200
    assert [request.control.objective.weights for request in requests] == [{"plain": 1.0}] * 2


def test_a_pinned_guardrail_watches_a_forced_call(make_app: Callable[..., FastAPI]) -> None:
    guarded = {**PINNED, "stop_below": {"plain": 1e6}}
    with TestClient(make_app(settings={"pinned_control": json.dumps(guarded)})) as client:
        (choice,) = chat(client, tools=[TOOL], tool_choice="required", max_tokens=80).json()["choices"]
    assert choice["finish_reason"] == "content_filter"
    with pytest.raises(ConfigurationError, match="pinned_control: in_calls: not false with stop_below"):
        make_app(settings={"pinned_control": json.dumps({**guarded, "in_calls": False})})


def text(response: Any) -> str:
    choice = response.json()["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def test_inert_fields_change_no_token_and_others_only_cut(
    pinned: tuple[TestClient, list[GenerationRequest]],
) -> None:
    client, _ = pinned
    whole = {send: text(send(client, model="tiny", max_tokens=24, seed=1)) for send in (complete, chat)}
    for field, value in {**INERT, **CUTS}.items():
        send, body = asked(field, value)
        got = text(send(client, **body)).removeprefix("hello" if field == "echo" else "")
        assert got == whole[send] if field in INERT else whole[send].startswith(got), field


def test_what_outweighs_pinned_control_is_refused_by_name(
    pinned: tuple[TestClient, list[GenerationRequest]],
) -> None:
    client, requests = pinned
    for field, value in OUTWEIGHS.items():
        for send in (complete, chat):
            response = send(client, model="tiny", max_tokens=4, **{field: value})
            assert (response.status_code, response.json()["error"]["param"]) == (400, field)
    for field, value in REFUSED_CONTROL.items():
        response = complete(client, model="tiny", control={**OTHERS, field: value})
        assert (response.status_code, response.json()["error"]["param"]) == (400, f"control.{field}")
    assert not requests
    neutral = {"logit_bias": {}, "repetition_penalty": 1.0, "temperature": 1.0, "frequency_penalty": 0}
    assert complete(client, model="tiny", max_tokens=2, **neutral).status_code == 200


def test_an_operator_says_what_else_is_refused(make_app: Callable[..., FastAPI]) -> None:
    settings = {
        "pinned_control": json.dumps(PINNED),
        "pinned_refuses": "guided_choice,response_format,ignore_eos,prompt",
    }
    with TestClient(make_app(settings=settings)) as client:
        for field, value in (
            ("guided_choice", ["bad"]),
            ("response_format", {"type": "json_object"}),
            ("ignore_eos", True),
        ):
            response = chat(client, **{field: value})
            assert (response.status_code, response.json()["error"]["param"]) == (400, field)
        assert complete(client).json()["error"]["param"] == "prompt"
        harmless = {"guided_choice": None, "response_format": {"type": "text"}, "ignore_eos": False}
        assert chat(client, logit_bias={"5": 8.0}, temperature=2.0, max_tokens=2, **harmless).status_code == 200


@pytest.mark.parametrize("field", ["add_generation_prompt", "parallel_tool_calls", "include_reasoning"])
def test_of_what_is_true_by_default_false_is_refused(make_app: Callable[..., FastAPI], field: str) -> None:
    settings = {"pinned_control": json.dumps(PINNED), "pinned_refuses": field}
    with TestClient(make_app(settings=settings)) as client:
        assert chat(client, max_tokens=2, **{field: True}).status_code == 200
        refused = chat(client, max_tokens=2, **{field: False})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)


def test_what_an_operator_refuses_is_refused_of_a_response_too(make_app: Callable[..., FastAPI]) -> None:
    open_answer = {"type": "message", "role": "assistant", "content": "Bad", "status": "incomplete"}
    said: dict[str, tuple[str, dict[str, Any]]] = {
        "response_format": ("text.format", {"text": {"format": {"type": "json_object"}}}),
        "reasoning_effort": ("reasoning.effort", {"reasoning": {"effort": "none"}}),
        "max_tokens": ("max_output_tokens", {"max_output_tokens": 4}),
        "max_completion_tokens": ("max_output_tokens", {"max_output_tokens": 4}),
        "logprobs": ("include", {"include": ["message.output_text.logprobs"]}),
        "continue_final_message": ("continue_final_message", {"input": [open_answer]}),
        "tools": ("tools", {"tools": [{"type": "function", "name": "f"}]}),
    }
    for field, (param, body) in said.items():
        settings = {"pinned_control": json.dumps(PINNED), "pinned_refuses": field}
        with TestClient(make_app(settings=settings)) as client:
            response = respond(client, **body)
            assert (response.status_code, response.json()["error"]["param"]) == (400, param)
            assert "must be" in response.json()["error"]["message"]
            finished = {"input": [open_answer], "continue_final_message": False, "text": {"format": {"type": "text"}}}
            assert respond(client, **finished, **({"max_output_tokens": 4} if "tokens" not in param else {})).is_success


def test_every_field_of_a_response_can_be_refused_or_says_what_to_answer() -> None:
    others = {"text", "reasoning", "include", "max_output_tokens"}
    asks = {"input", "instructions", "model", "control", "max_tool_calls"}
    assert ResponseBody.model_fields.keys() - FIELDS == others | asks


@pytest.mark.parametrize("name", ["nothing", "model", "control.gate"])
def test_only_fields_of_a_request_can_be_refused(make_app: Callable[..., FastAPI], name: str) -> None:
    assert name not in FIELDS
    with pytest.raises(ConfigurationError, match="pinned_refuses"):
        make_app(settings={"pinned_control": json.dumps(PINNED), "pinned_refuses": name})


def test_refusals_without_pinned_control_are_a_mistake(make_app: Callable[..., FastAPI]) -> None:
    with pytest.raises(ConfigurationError, match="pinned_control"):
        make_app(settings={"pinned_refuses": "stop"})
    with TestClient(make_app()) as client:
        assert complete(client, temperature=2.0, max_tokens=2).status_code == 200
