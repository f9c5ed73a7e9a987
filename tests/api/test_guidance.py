"""An instruction as a request's objective over HTTP: what reaches the engine, what it costs, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from server.control.objectives import MAX_INSTRUCTION_CHARS
from server.types import GenerationRequest
from tests.api.conftest import chat, complete, recording, respond

TEXT = "Be glad."
GUIDED: dict[str, Any] = {"objective": {"type": "instruction", "text": TEXT, "weight": 1.5}}
Seen = tuple[TestClient, list[GenerationRequest]]


def told(*, max_kl: float = 0.3, **objective: Any) -> dict[str, Any]:
    return {"objective": {**GUIDED["objective"], **objective}, "max_kl": max_kl}


@pytest.fixture
def seen(make_app: Callable[..., FastAPI]) -> Iterator[Seen]:
    with recording(make_app()) as client_and_requests:
        yield client_and_requests


def error_of(response: Any) -> dict[str, Any]:
    assert response.status_code == 400, response.text
    return response.json()["error"]


def texts(request: GenerationRequest) -> tuple[str, str]:
    """The prompt, alone and behind the instruction."""
    return bytes(request.prompt_token_ids).decode(), bytes(request.instructed_token_ids).decode()


def test_a_conversation_gets_it_as_its_system_message(seen: Seen) -> None:
    client, requests = seen
    for response in (chat(client, max_tokens=2, control=GUIDED), respond(client, control=GUIDED)):
        assert response.status_code == 200, response.text
    for request in requests:
        prompt, instructed = texts(request)
        assert instructed == f"system: {TEXT}\n{prompt}"
        assert request.num_rows == 2


def test_a_plain_prompt_stays_the_same_tokens_behind_it(seen: Seen) -> None:
    client, requests = seen
    for prompt in ("hello", ["hello", "you"], [104, 105], [[104], [105]]):
        assert complete(client, prompt=prompt, max_tokens=2, n=2, echo=True, control=GUIDED).status_code == 200
    assert len(requests) == 6
    for request in requests:
        prompt, instructed = texts(request)
        assert instructed == f"{TEXT}\n\n{prompt}"


def test_the_summary_of_an_instruction_alone_names_no_values(seen: Seen) -> None:
    (choice,) = complete(seen[0], max_tokens=2, control={**GUIDED, "trace": True}).json()["choices"]
    assert choice["control"]["value_before"] == choice["control_trace"][0]["value_after"] == {}


@pytest.mark.parametrize("nothing", [told(weight=0), {**GUIDED, "steps": 0}, {**GUIDED, "step_size": 0}])
def test_one_that_changes_nothing_is_not_read(seen: Seen, nothing: dict[str, Any]) -> None:
    client, requests = seen
    assert complete(client, max_tokens=2, control=nothing).status_code == 200
    assert (requests[0].instructed_token_ids, requests[0].num_rows) == ((), 1)


def test_any_objective_over_heads_goes_beside_it(seen: Seen) -> None:
    client, requests = seen
    for beside in (
        {"weights": {"positive": 1.0}},
        {"type": "worst_case", "weights": {"positive": 1.0, "plain": 2.0}},
        {"type": "target", "values": {"plain": 0.5}},
        {"type": "floor", "weights": {"positive": 1.0}, "floors": {"plain": 0.5}},
    ):
        assert complete(client, max_tokens=2, control=told(beside=beside)).status_code == 200
    assert [sorted(request.named_heads) for request in requests] == [
        ["positive"], ["plain", "positive"], ["plain"], ["plain", "positive"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"text": ""}, "control.objective.text"),
        ({"text": " \n"}, "control.objective.text"),
        ({"text": "x" * (MAX_INSTRUCTION_CHARS + 1)}, "control.objective.text"),
        ({"text": 3}, "control.objective.text"),
        ({"text": None}, "control.objective.text"),
        ({"weight": 10.5}, "control.objective.weight"),
        ({"weight": -11}, "control.objective.weight"),
        ({"weight": "1"}, "control.objective.weight"),
        ({"contrast": "Be sad."}, "control.objective.contrast"),
        ({"weights": {"positive": 1.0}}, "control.objective.weights"),
        ({"beside": {"weights": {}}}, "control.objective.beside.weights"),
        ({"beside": GUIDED["objective"]}, "control.objective.beside"),
        ({"beside": {}}, "control.objective.beside.weights"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_with_it_is_said_by_name(seen: Seen, fields: dict[str, Any], param: str) -> None:
    error = error_of(complete(seen[0], control=told(**fields)))
    assert param in error["message"]
    assert not seen[1]


def test_a_head_beside_it_that_is_not_there_is_named_with_its_field(seen: Seen) -> None:
    for beside, field in (
        ({"weights": {"nobody": 1.0}}, "weights"),
        ({"type": "target", "values": {"n": 0}}, "values"),
    ):
        response = complete(seen[0], control=told(beside=beside))
        assert (response.status_code, response.json()["error"]["param"]) == (404, f"control.objective.beside.{field}")


def test_half_a_character_is_no_text(seen: Seen) -> None:
    body = '{"model": "fake", "prompt": "a", "control": {"objective": {"type": "instruction", "text": "\\ud800"}}}'
    response = seen[0].post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert "text" in error_of(response)["message"]


@pytest.mark.parametrize("send", [complete, chat, respond])
def test_a_prompt_that_is_too_long_with_it_is_refused_with_the_lengths(seen: Seen, send: Callable[..., Any]) -> None:
    error = error_of(send(seen[0], control=told(text="x" * 4096)))
    assert (error["param"], error["code"]) == ("control.objective.text", "context_length_exceeded")
    assert "(without it " in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"control": {**GUIDED, "search": {"type": "blocks"}}}, "control.search"),
        ({"control": GUIDED, "best_of": 3}, "best_of"),
        ({"control": GUIDED, "model": "fake@positive"}, "control"),
    ],
    ids=["search", "best_of", "model"],
)
def test_what_does_not_go_with_it_is_refused_by_name(seen: Seen, fields: dict[str, Any], param: str) -> None:
    assert error_of(complete(seen[0], **fields))["param"] == param


def test_both_rows_are_paid_and_usage_tells_of_the_response(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(settings={"api_keys": "sk-test-0123456789", "tokens_per_minute": 100})) as client:
        client.headers["authorization"] = "Bearer sk-test-0123456789"
        response = complete(client, control=GUIDED, max_tokens=10, stop=["\n"])
        assert response.json()["usage"] == {"prompt_tokens": 5, "completion_tokens": 10, "total_tokens": 15}
        # 5 and 15 tokens of prompts, and twice 10 new ones.
        assert complete(client, max_tokens=56).status_code == 429
        assert complete(client, max_tokens=50).status_code == 200


def test_a_retry_does_not_go_with_it(client: TestClient) -> None:
    control = {**GUIDED, "stop_below": {"plain": 0.0}, "on_stop": "retry"}
    assert "on_stop retry does not go with an instruction" in error_of(complete(client, control=control))["message"]
