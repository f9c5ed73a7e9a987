"""A guardrail that repairs, over HTTP: what is shown, counted, charged and refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from server.api.resolution import with_pinned
from server.app import create_app
from server.control.params import ControlParams
from server.control.repair import DEFAULT_REPLACEMENT, Stop
from server.engines.fake import FakeEngine
from server.engines.vllm.sampling import check_served
from server.errors import ConfigurationError, InvalidRequestError, UnsupportedFieldError
from server.settings import Settings
from server.types import GenerationRequest
from tests.api.conftest import chat, complete, recording, respond
from tests.api.test_completions import events
from tests.conftest import control

BOUND: dict[str, Any] = {"objective": {"weights": {"positive": 1.0}}, "stop_below": {"plain": 0.5}}
RETRY: dict[str, Any] = {"type": "retry", "hold_tokens": 4}
KEY = {"Authorization": "Bearer Caller-0123456789"}


def low_once(place: int, num_retries: int) -> float:
    """Every head's value is low at the seventh token, until it is drawn again."""
    return 0.1 if place == 6 and not num_retries else 0.9


def always_low(place: int, num_retries: int) -> float:
    del num_retries
    return 0.1 if place == 6 else 0.9


@pytest.fixture
def repaired(make_app: Callable[..., FastAPI]) -> Iterator[TestClient]:
    with TestClient(make_app(value_of=low_once)) as client:
        yield client


@pytest.fixture
def broken(make_app: Callable[..., FastAPI]) -> Iterator[TestClient]:
    with TestClient(make_app(value_of=always_low)) as client:
        yield client


def text_of(body: dict[str, Any]) -> str:
    """Of a whole answer of any route."""
    if "output" in body:
        return "".join(part["text"] for item in body["output"] if item["type"] == "message" for part in item["content"])
    choice = body["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def streamed_text(response: Any) -> str:
    """Of the events of any route."""
    text = ""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    for event in map(json.loads, lines):
        if event.get("type") == "response.output_text.delta":
            text += event["delta"]
        for choice in event.get("choices", ()):
            text += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
    return text


def size(send: Callable[..., Any], num_tokens: int) -> dict[str, int]:
    return {"max_output_tokens" if send is respond else "max_tokens": num_tokens}


@pytest.mark.parametrize("send", [complete, chat, respond])
def test_a_retry_is_seen_in_the_report_alone(repaired: TestClient, send: Callable[..., Any]) -> None:
    asked = {"control": {**BOUND, "on_stop": RETRY}, "seed": 1, **size(send, 12)}
    free = text_of(send(repaired, control={**BOUND, "stop_below": {"plain": 0.0}}, seed=1, **size(send, 12)).json())
    body = send(repaired, **asked).json()
    told = body["control"] if send is respond else body["choices"][0]["control"]
    assert told["guardrail"] == {"retries": 1, "tokens_taken_back": 2, "replaced": False}
    assert "stopped_by" not in told
    assert text_of(body)[:5] == free[:5]
    assert text_of(body) != free
    assert len(text_of(body)) == body["usage"]["output_tokens" if send is respond else "completion_tokens"] == 12
    assert streamed_text(send(repaired, stream=True, **asked)) == text_of(body)


@pytest.mark.parametrize("send", [complete, chat, respond])
@pytest.mark.parametrize("on_stop", ["replace", {**RETRY, "then": "replace", "max_retries": 3}])
def test_a_text_takes_the_place_of_what_was_held(broken: TestClient, send: Callable[..., Any], on_stop: Any) -> None:
    asked = {"control": {**BOUND, "on_stop": on_stop}, "seed": 1, **size(send, 20)}
    body = send(broken, **asked).json()
    num_shown = 0 if on_stop == "replace" else 2
    assert text_of(body)[num_shown:] == DEFAULT_REPLACEMENT
    told = body["control"] if send is respond else body["choices"][0]["control"]
    assert told["guardrail"]["replaced"]
    assert told["stopped_by"] == {"plain": {"value": 0.1, "bound": 0.5}}
    if send is respond:
        assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "content_filter"})
    else:
        assert body["choices"][0]["finish_reason"] == "content_filter"
        assert body["usage"]["completion_tokens"] == num_shown
    assert streamed_text(send(broken, stream=True, **asked)) == text_of(body)


def test_the_text_is_the_requests_or_else_the_operators(make_app: Callable[..., FastAPI]) -> None:
    app = make_app(value_of=always_low, settings={"guardrail_replacement": "Operator's."})
    with TestClient(app) as client:
        for own, expected in ((None, "Operator's."), ("Caller's.", "Caller's.")):
            for on_stop in ({"type": "replace"}, {"type": "retry", "then": "replace"}):
                asked = {**BOUND, "on_stop": {**on_stop, "replacement": own}}
                assert text_of(complete(client, control=asked).json()) == expected


def test_nothing_is_shown_before_it_is_safe(broken: TestClient) -> None:
    for on_stop, num_shown in ((RETRY, 2), ({"type": "stop", "hold_tokens": 5}, 1), ({"type": "stop"}, 7)):
        asked = {"control": {**BOUND, "on_stop": on_stop}, "seed": 1, "max_tokens": 20, "logprobs": 1}
        free = text_of(complete(broken, seed=1, max_tokens=20).json())
        choice = complete(broken, **asked).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (free[:num_shown], "content_filter")
        assert len(choice["logprobs"]["tokens"]) == num_shown
        options = {"include_usage": True, "continuous_usage_stats": True}
        for event in events(complete(broken, stream=True, stream_options=options, **asked)):
            assert event["usage"]["completion_tokens"] <= num_shown


def test_a_trace_is_of_the_tokens_that_are_kept(repaired: TestClient) -> None:
    asked = {**BOUND, "on_stop": RETRY, "trace": True}
    choice = complete(repaired, control=asked, max_tokens=12, seed=1).json()["choices"][0]
    assert [entry["value_after"]["plain"] for entry in choice["control_trace"]] == [0.9] * 12
    assert bytes(entry["token_id"] for entry in choice["control_trace"]).decode() == choice["text"]


def test_choices_repair_each_for_itself(repaired: TestClient) -> None:
    asked = {"control": {**BOUND, "on_stop": RETRY}, "seed": 1, "max_tokens": 12, "n": 3}
    body = complete(repaired, **asked).json()
    assert [choice["control"]["guardrail"]["retries"] for choice in body["choices"]] == [1, 1, 1]
    assert body["usage"]["completion_tokens"] == 36
    assert body["choices"][0]["text"] == complete(repaired, **{**asked, "n": 1}).json()["choices"][0]["text"]


def test_an_echoed_prompts_scores_come_with_the_first_event(repaired: TestClient) -> None:
    asked = {"control": {**BOUND, "on_stop": RETRY}, "echo": True, "logprobs": 0, "max_tokens": 8, "n": 2}
    whole = complete(repaired, **asked).json()["choices"][0]["logprobs"]
    streamed = [
        e["choices"][0] for e in events(complete(repaired, stream=True, **asked)) if e["choices"][0]["index"] == 0
    ]
    tokens = [token for choice in streamed if choice["logprobs"] for token in choice["logprobs"]["tokens"]]
    assert tokens == whole["tokens"]
    assert "".join(tokens).startswith("hello")


def test_reasoning_that_breaks_a_bound_ends_with_the_text_as_the_answer(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(value_of=always_low, reasoning_tokens=20, opens_reasoning=True)) as client:
        asked = {"control": {**BOUND, "on_stop": {"type": "replace", "hold_tokens": 3}}, "max_tokens": 30}
        message = chat(client, **asked).json()["choices"][0]["message"]
        assert message["content"] == DEFAULT_REPLACEMENT
        assert len(message["reasoning_content"]) == 3
        hidden = chat(client, include_reasoning=False, **asked).json()["choices"][0]["message"]
        assert hidden["content"] == DEFAULT_REPLACEMENT


def test_metrics_count_what_was_repaired(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(value_of=always_low)) as client:
        asked = {**BOUND, "on_stop": {**RETRY, "then": "replace", "max_retries": 3}}
        complete(client, control=asked, max_tokens=20)
        text = client.get("/metrics").text
    for name, count in (("retries", 3), ("replacements", 1), ("taken_back_tokens", 3 * 2 + 5)):
        assert f'recontrol_guardrail_{name}_total{{model_name="fake"}} {count}.0' in text
    assert 'recontrol_generation_tokens_total{model_name="fake"} 2.0' in text


@pytest.mark.parametrize(("limit", "status"), [(38, 200), (37, 429)])
def test_what_is_taken_back_is_paid_for(make_app: Callable[..., FastAPI], limit: int, status: int) -> None:
    settings = {"api_keys": "Caller-0123456789", "tokens_per_minute": limit}
    with TestClient(make_app(value_of=low_once, settings=settings), headers=KEY) as client:
        usage = complete(client, control={**BOUND, "on_stop": RETRY}, max_tokens=12).json()["usage"]
        assert usage["total_tokens"] == 17
        # Two tokens were taken back, so that 19 are left or one fewer.
        assert complete(client, max_tokens=14).status_code == status


def test_what_may_be_drawn_again_counts_among_the_tokens_that_a_request_may_ask_for(repaired: TestClient) -> None:
    way = {"type": "retry", "max_retries": 16, "rewind_tokens": 256, "hold_tokens": 256}
    asked = {"prompt": ["hello"] * 32, "max_tokens": 64, "control": {**BOUND, "on_stop": way}}
    refused = complete(repaired, **asked)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")
    assert "4112 that control.on_stop may draw again" in refused.json()["error"]["message"]
    assert complete(repaired, **{**asked, "prompt": "hello"}).status_code == 200


def test_whole_responses_do_not_compete_under_it(repaired: TestClient) -> None:
    for on_stop in ("retry", "replace", {"type": "stop", "hold_tokens": 1}):
        refused = complete(repaired, best_of=3, control={**BOUND, "on_stop": on_stop})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "best_of")
    assert complete(repaired, best_of=3, max_tokens=2, control={**BOUND, "on_stop": "stop"}).status_code == 200


PINNED = {"objective": {"weights": {"plain": 1.0}}, "stop_below": {"plain": 0.5}}


def test_what_is_pinned_repairs_every_request(make_app: Callable[..., FastAPI]) -> None:
    pinned = json.dumps({**PINNED, "on_stop": {**RETRY, "step_growth": 2.0}})
    with TestClient(make_app(value_of=low_once, settings={"pinned_control": pinned})) as client:
        for asked in ({}, {"model": "fake@plain"}, {"model": "fake@positive"}, {"control": BOUND}):
            told = complete(client, max_tokens=12, **asked).json()["choices"][0]["control"]
            assert told["guardrail"]["retries"] == 1


def test_a_callers_bound_lets_nothing_be_drawn_again_where_heads_are_pinned(make_app: Callable[..., FastAPI]) -> None:
    pinned = json.dumps({**PINNED, "stop_below": {"plain": 0.0}, "on_stop": {**RETRY, "then": "replace"}})
    with TestClient(make_app(value_of=low_once, settings={"pinned_control": pinned})) as client:
        for bounds in ({"plain": 0.5}, {"positive": 0.5}):
            asked = {"objective": {"weights": {"positive": 1.0}}, "stop_below": bounds}
            choice = complete(client, max_tokens=12, control=asked).json()["choices"][0]
            assert choice["text"].endswith(DEFAULT_REPLACEMENT)
            assert choice["control"]["guardrail"]["retries"] == 0


def test_a_caller_may_replace_what_pinned_control_only_stops(make_app: Callable[..., FastAPI]) -> None:
    with recording(make_app(value_of=low_once, settings={"pinned_control": json.dumps(PINNED)})) as (client, requests):
        asked = {**BOUND, "on_stop": {"type": "replace", "replacement": "Mine."}}
        assert text_of(complete(client, control=asked).json()) == "Mine."
        refused = complete(client, control={**BOUND, "on_stop": "retry"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "control.on_stop")
    assert len(requests) == 1


def test_a_pinned_repair_is_not_for_callers_to_change() -> None:
    pinned = control({"plain": 1.0}, stop_below={"plain": 0.5}, on_stop={"type": "replace"})
    bound = {"stop_below": {"a": 0.1}}
    for asked, field in (
        (control({"a": 1.0}, **bound, on_stop={"type": "stop", "hold_tokens": 3}), "control.on_stop"),
        (control({"a": 1.0}, search={"type": "blocks"}), "control.search"),
    ):
        with pytest.raises(InvalidRequestError) as refused:
            with_pinned(asked, pinned)
        assert refused.value.param == field
    merged = with_pinned(control({"a": 1.0}, **bound, on_stop="stop"), pinned)
    assert merged is not None
    assert merged.on_stop == pinned.on_stop


def test_retries_make_the_pinned_steps_larger_too() -> None:
    pinned = control(
        {"plain": 1.0}, stop_below={"plain": 0.5}, on_stop={"type": "retry", "step_growth": 2.0}, step_size=0.1
    )
    merged = with_pinned(control({"a": 1.0}, step_size=4.0), pinned)
    assert merged is not None
    stronger = merged.strengthened(2)
    assert (stronger.step_size, stronger.pinned.step_size) == (10.0, 0.4)  # type: ignore[attr-defined]
    assert (stronger.max_kl, stronger.max_shift) == (merged.max_kl, merged.max_shift)


def test_the_name_alone_is_short_for_the_defaults() -> None:
    for name in ("stop", "retry", "replace"):
        assert control({"a": 1.0}, stop_below={"a": 0.0}, on_stop=name) == control(
            {"a": 1.0}, stop_below={"a": 0.0}, on_stop={"type": name}
        )
    assert control({"a": 1.0}, on_stop=None).on_stop == Stop()


@pytest.mark.parametrize("settings", [{"guardrail_replacement": "a"}, {"guardrail_replacement": ""}])
def test_a_replacement_that_no_response_could_have_is_refused_at_the_start(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="guardrail_replacement"):
        Settings(**settings, **({"engine": "vllm"} if settings["guardrail_replacement"] else {}))


def test_vllm_cannot_pin_what_it_does_not_serve() -> None:

    pinned = json.dumps({**PINNED, "on_stop": "replace"})
    with pytest.raises(ConfigurationError, match="on_stop: the vLLM engine only stops"):
        create_app(Settings(engine="vllm", pinned_control=pinned), FakeEngine())


def test_the_vllm_engine_refuses_it_by_name() -> None:

    for on_stop in ("retry", "replace", {"type": "stop", "hold_tokens": 1}):
        steer = ControlParams.model_validate({**BOUND, "on_stop": on_stop})
        with pytest.raises(UnsupportedFieldError, match=r"control\.on_stop"):
            check_served(GenerationRequest("r", (1,), control=steer))
    check_served(GenerationRequest("r", (1,), control=ControlParams.model_validate({**BOUND, "on_stop": "stop"})))
