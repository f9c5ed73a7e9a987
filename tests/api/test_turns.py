"""Bounds that change over turns, as a server applies them: what a turn is, what `hold` reads, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from server.api.turns import MAX_HELD_ANSWERS
from server.errors import ConfigurationError
from server.types import GenerationRequest
from tests.api.conftest import chat, complete, recording, respond

USER = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "good day"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLS = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "3"}
TIGHTENS = {
    "objective": {"weights": {"positive": 1.0}},
    "stop_below": {"plain": 0.125},
    "over_turns": {"stop_below": {"plain": {"tighten": 0.0625, "to": 0.5}}},
}
HOLDS = {**TIGHTENS, "over_turns": {"stop_below": {"plain": {"hold": 0.5}}}}


def bound_of(request: GenerationRequest) -> float:
    assert request.control is not None
    assert request.control.stop_below is not None
    assert request.control.over_turns is None
    return request.control.stop_below["plain"]


@pytest.mark.parametrize(
    ("messages", "fields", "turn"),
    [
        ([USER], {}, 0),
        ([{"role": "system", "content": "Be kind."}, USER], {}, 0),
        ([USER, ANSWER, USER], {}, 1),
        ([USER, CALLS, RESULT], {}, 1),
        ([USER, CALLS, RESULT, ANSWER, USER], {}, 2),
        ([USER, ANSWER], {}, 1),
        ([USER, ANSWER], {"continue_final_message": True}, 0),
        ([USER, ANSWER, USER, ANSWER], {"continue_final_message": True}, 1),
        ([USER, ANSWER, USER], {"add_generation_prompt": False}, 1),
        ([USER, *[ANSWER, USER] * 9], {}, 6),
    ],
)
def test_a_turn_is_each_message_that_the_assistant_has_said_before(
    make_app: Callable[..., FastAPI], messages: list[Any], fields: dict[str, Any], turn: int
) -> None:
    with recording(make_app()) as (client, requests):
        response = chat(client, messages=messages, max_tokens=2, control=TIGHTENS, **fields)
    assert response.status_code == 200, response.text
    assert bound_of(requests[-1]) == 0.125 + 0.0625 * turn


def test_a_response_has_the_turn_of_the_same_chat(make_app: Callable[..., FastAPI]) -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c1", "output": "3"}
    unfinished = {"type": "message", "status": "incomplete", **ANSWER}
    for items, turn in (("hello", 0), ([USER, call, output], 1), ([USER, ANSWER, USER, unfinished], 1)):
        with recording(make_app()) as (client, requests):
            response = respond(client, input=items, max_output_tokens=16, control=TIGHTENS)
        assert response.status_code == 200, response.text
        assert bound_of(requests[-1]) == 0.125 + 0.0625 * turn


def test_a_completion_has_no_turns(make_app: Callable[..., FastAPI]) -> None:
    with recording(make_app()) as (client, requests):
        response = complete(client, control=TIGHTENS)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "control.over_turns")
    assert not requests


def test_pinned_bounds_tighten_too_and_of_a_completion_they_are_those_of_the_first_turn(
    make_app: Callable[..., FastAPI],
) -> None:
    conversation = [USER, ANSWER, USER, ANSWER, USER]
    callers = {"objective": {"weights": {"calm": 1.0}}, "stop_below": {"plain": 0.1875}}
    rising = {**callers, "over_turns": {"stop_below": {"plain": {"tighten": 1, "to": 0.375}}}}
    app = make_app(settings={"pinned_control": json.dumps(TIGHTENS)}, heads=["positive", "plain", "calm"])
    with recording(app) as (client, requests):
        for control in (None, callers, rising):
            assert chat(client, messages=conversation, max_tokens=2, control=control).status_code == 200
        assert chat(client, messages=conversation, max_tokens=2, model="fake@calm").status_code == 200
        assert complete(client, max_tokens=2).status_code == 200
    assert [bound_of(request) for request in requests] == [0.25, 0.25, 0.375, 0.25, 0.125]


def value_of(client: TestClient, messages: list[Any]) -> float:
    response = client.post("/v1/value", json={"model": "fake", "messages": messages, "heads": ["plain"]})
    return response.json()["data"][0]["values"]["plain"]


def test_hold_goes_by_the_worst_value_that_the_ends_of_earlier_answers_had(make_app: Callable[..., FastAPI]) -> None:
    answers = [{"role": "assistant", "content": text} for text in ("good day", "well", "indeed")]
    conversation = [USER, answers[0], USER, answers[1], USER, answers[2], USER]
    with recording(make_app()) as (client, requests):
        for messages in ([USER], conversation):
            response = chat(client, messages=messages, max_tokens=2, control=HOLDS)
            assert response.json()["usage"]["prompt_tokens"] == len(requests[-1].prompt_token_ids)
        worst = min(value_of(client, conversation[:end]) for end in (2, 4, 6))
        bounds = [bound_of(request) for request in requests if request.control is not None]
        assert bounds == [0.125, max(0.125, 0.125 + 0.5 * (worst - 0.125))]
        assert bounds[1] > 0.125


def test_hold_reads_the_last_answers_that_have_a_text_and_not_what_is_continued(
    make_app: Callable[..., FastAPI],
) -> None:
    early = [message for _ in range(9) for message in (USER, ANSWER)]
    with recording(make_app()) as (client, requests):
        messages = [*early, USER, CALLS, RESULT, ANSWER]
        assert chat(client, messages=messages, max_tokens=2, control=HOLDS, continue_final_message=True).is_success
    read = [request for request in requests if request.scoring is not None]
    assert len(read) == MAX_HELD_ANSWERS
    # The longest is read first, so that the others find what they begin with in the cache.
    assert len(read[0].prompt_token_ids) == max(len(request.prompt_token_ids) for request in read)
    prompt = requests[-1].prompt_token_ids
    assert all(prompt[: len(request.prompt_token_ids)] == request.prompt_token_ids for request in read)
    assert len({request.cache_salt for request in requests}) == 1


def test_hold_is_refused_by_name_where_the_engine_reads_no_values(make_app: Callable[..., FastAPI]) -> None:
    app = make_app()
    app.state.engine.info = app.state.engine.info.__class__("fake", 4096, 256, {"positive": {}, "plain": {}})
    with TestClient(app) as client:
        response = chat(client, control=HOLDS)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "control.over_turns")
        assert chat(client, control=TIGHTENS, max_tokens=2).status_code == 200
    pinned = make_app(settings={"pinned_control": json.dumps(HOLDS)})
    pinned.state.engine.info = app.state.engine.info
    with pytest.raises(ConfigurationError, match="hold"), TestClient(pinned):
        pass


def test_an_unknown_head_is_told_before_anything_is_read(make_app: Callable[..., FastAPI]) -> None:
    control = {**HOLDS, "stop_below": {"nobody": 0.1}, "over_turns": {"stop_below": {"nobody": {"hold": 1}}}}
    with recording(make_app()) as (client, requests):
        response = chat(client, messages=[USER, ANSWER, USER], control=control)
    assert (response.status_code, response.json()["error"]["param"]) == (404, "control.stop_below")
    assert not requests


@pytest.mark.parametrize("rule", [{"tighten": 0.0, "to": 1.0}, {"hold": 0.0}])
def test_a_bound_that_does_not_change_gives_the_tokens_of_one_that_stays(
    make_embedded_app: Callable[..., FastAPI], rule: dict[str, float]
) -> None:
    stays = {"objective": {"type": "floor", "weights": {"positive": 1.0}, "floors": {"plain": 0.5}}, "trace": True}
    body = {"messages": [USER, ANSWER, USER], "model": "tiny", "max_tokens": 16, "seed": 1}
    with TestClient(make_embedded_app()) as client:
        told = [
            chat(client, **body, control=control).json()["choices"]
            for control in (stays, {**stays, "over_turns": {"floors": {"plain": rule}}})
        ]
    assert told[0] == told[1]


def test_a_bound_at_a_turn_is_that_bound_and_neighbours_are_left_alone(
    make_embedded_app: Callable[..., FastAPI],
) -> None:
    objective = {"type": "floor", "weights": {"positive": 1.0}, "floors": {"plain": 0.5}}
    rises = {"objective": objective, "over_turns": {"floors": {"plain": {"tighten": 0.25, "to": 4.0}}}}
    risen = {"objective": {**objective, "floors": {"plain": 0.75}}}
    with TestClient(make_embedded_app()) as client, ThreadPoolExecutor() as pool:

        def ask(control: dict[str, Any] | None) -> Any:
            body = {"messages": [USER, ANSWER, USER], "model": "tiny", "max_tokens": 16, "seed": 1}
            return chat(client, **body, control=control).json()["choices"]

        alone = [ask(control) for control in (None, {"objective": objective})]
        told = list(pool.map(ask, (None, {"objective": objective}, rises, risen)))
    assert told[:2] == alone
    assert told[2] == told[3]
