import json
import math
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from server.engines.choice import Choice
from server.types import TokenEdit
from tests.api.conftest import chat, complete

CONTROL = {"objective": {"type": "weighted_sum", "weights": {"positive": 1.0}}, "max_kl": 0.3}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def joined(response: httpx.Response) -> dict[int, str]:
    texts: dict[int, str] = {}
    for event in events(response):
        for choice in event["choices"]:
            text = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            texts[choice["index"]] = texts.get(choice["index"], "") + text
    return texts


def test_a_completion_has_openais_shape(client: TestClient) -> None:
    body = complete(client, max_tokens=5).json()
    assert body["object"] == "text_completion"
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
    (choice,) = body["choices"]
    assert len(choice.pop("text")) == 5
    assert choice == {"index": 0, "logprobs": None, "finish_reason": "length"}


@pytest.mark.parametrize("prompt", ["hi", ["hi", "ho"], [104, 105], [[104], [105, 106]]])
def test_every_form_of_prompt_is_taken(client: TestClient, prompt: Any) -> None:
    body = complete(client, prompt=prompt, max_tokens=3).json()
    expected = 2 if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    assert [choice["index"] for choice in body["choices"]] == list(range(expected))


@pytest.mark.parametrize(
    "options",
    [{}, {"n": 3}, {"prompt": ["a", "b"], "n": 2}, {"stop": ["e", "t"]}, {"echo": True}, {"control": CONTROL}],
)
def test_streamed_text_equals_the_text_of_the_same_request_not_streamed(
    client: TestClient, options: dict[str, Any]
) -> None:
    options = {"max_tokens": 20, "seed": 4, **options}
    whole = {choice["index"]: choice["text"] for choice in complete(client, **options).json()["choices"]}
    assert joined(complete(client, stream=True, **options)) == whole


def test_every_streamed_choice_has_one_finish_reason_on_its_last_event(client: TestClient) -> None:
    streamed = events(complete(client, stream=True, n=3, max_tokens=6))
    reasons = [choice["finish_reason"] for event in streamed for choice in event["choices"]]
    assert [reason for reason in reasons if reason] == ["length"] * 3


def test_usage_comes_last_with_no_choices_when_asked_for(client: TestClient) -> None:
    streamed = events(complete(client, stream=True, max_tokens=4, stream_options={"include_usage": True}))
    assert streamed[-1]["choices"] == []
    assert streamed[-1]["usage"]["completion_tokens"] == 4
    assert all(event["usage"] is None for event in streamed[:-1])


def test_continuous_usage_grows_with_every_event(client: TestClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    streamed = events(complete(client, stream=True, max_tokens=4, stream_options=options))
    assert [event["usage"]["completion_tokens"] for event in streamed] == [1, 2, 3, 4, 4]


def test_control_is_summarised_on_the_choice_and_absent_without_control(client: TestClient) -> None:
    (choice,) = complete(client, control=CONTROL).json()["choices"]
    assert set(choice["control"]) == {
        "value_before", "value_after", "mean_shift", "mean_kl", "max_kl", "controlled_share", "held_share",
        "nonfinite_edits",
    }  # fmt: skip
    assert "control" not in complete(client).json()["choices"][0]
    streamed = events(complete(client, control=CONTROL, stream=True))
    assert "positive" in streamed[-1]["choices"][0]["control"]["value_after"]


def test_a_model_id_with_a_head_means_that_heads_default_objective(client: TestClient) -> None:
    (choice,) = complete(client, model="fake@plain").json()["choices"]
    assert list(choice["control"]["value_before"]) == ["plain"]
    assert complete(client, model="fake@plain", control=CONTROL).status_code == 400


def test_log_probabilities_have_the_legacy_format(client: TestClient) -> None:
    (choice,) = complete(client, logprobs=2, max_tokens=3).json()["choices"]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == 3
    # The chosen token is always there, beside the two most likely ones.
    for token, logprob, top in zip(*map(logprobs.get, ("tokens", "token_logprobs", "top_logprobs")), strict=True):
        assert top[token] == logprob
        assert len(top) == 2 + (token not in "et")
    assert logprobs["text_offset"] == [0, 1, 2]
    (choice,) = complete(client, logprobs=0, max_tokens=3).json()["choices"]
    assert choice["logprobs"]["top_logprobs"] == [{token: -2.0} for token in choice["logprobs"]["tokens"]]


def test_echo_returns_the_prompt_and_its_log_probabilities(client: TestClient) -> None:
    (choice,) = complete(client, echo=True, logprobs=0, max_tokens=0).json()["choices"]
    assert choice["text"] == "hello"
    assert choice["logprobs"]["tokens"] == list("hello")
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert None not in choice["logprobs"]["token_logprobs"][1:]
    assert choice["logprobs"]["top_logprobs"] == [None, *({letter: -2.0} for letter in "ello")]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]
    assert complete(client, prompt=[104, 105], echo=True, max_tokens=1).json()["choices"][0]["text"][:2] == "hi"


def test_null_means_the_default_everywhere(client: TestClient) -> None:
    fields = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "stop", "stop_token_ids", "ignore_eos",
              "logit_bias", "presence_penalty", "frequency_penalty", "repetition_penalty", "logprobs", "echo", "stream",
              "stream_options", "user", "timeout_s", "control", "best_of", "suffix"]  # fmt: skip
    nulls = complete(client, seed=1, **dict.fromkeys(fields)).json()
    assert nulls["choices"] == complete(client, seed=1).json()["choices"]


def test_a_chat_has_openais_shape_streamed_and_not(client: TestClient) -> None:
    body = chat(client, max_tokens=4, seed=2).json()
    assert body["object"] == "chat.completion"
    message = body["choices"][0]["message"]
    assert message["role"] == "assistant"
    response = chat(client, max_tokens=4, seed=2, stream=True)
    assert joined(response) == {0: message["content"]}
    assert events(response)[0]["choices"][0]["delta"]["role"] == "assistant"


def test_chat_takes_text_parts_and_a_null_name(client: TestClient) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}], "name": None}]
    assert chat(client, messages=parts, seed=1).json()["choices"] == chat(client, seed=1).json()["choices"]


def test_chat_log_probabilities_have_openais_format(client: TestClient) -> None:
    (choice,) = chat(client, logprobs=True, top_logprobs=3, max_completion_tokens=2).json()["choices"]
    first = choice["logprobs"]["content"][0]
    assert {"token", "logprob", "bytes", "top_logprobs"} == set(first)
    assert len(first["top_logprobs"]) == 3


def test_models_and_heads_are_listed(client: TestClient) -> None:
    models = client.get("/v1/models").json()
    assert [model["id"] for model in models["data"]] == ["fake", "fake@positive", "fake@plain"]
    assert client.get("/v1/models/fake@plain").json()["parent"] == "fake"
    assert [head["id"] for head in client.get("/v1/heads").json()["data"]] == ["positive", "plain"]
    assert client.get("/v1/heads/plain").json()["id"] == "plain"


def test_a_chat_without_max_tokens_may_fill_the_context(client: TestClient) -> None:
    answer = chat(client).json()
    assert answer["usage"]["total_tokens"] == 4096
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("send", [complete, chat])
def test_a_trace_tells_what_control_did_to_each_token_streamed_and_not(client: TestClient, send: Any) -> None:
    options = {"control": {**CONTROL, "trace": True}, "max_tokens": 4, "n": 2, "seed": 1}
    body = send(client, **options).json()
    for choice in body["choices"]:
        assert len(choice["control_trace"]) == 4
        entry = choice["control_trace"][0]
        assert set(entry) == {"token_id", *TokenEdit.__dataclass_fields__}
        assert (entry["held_by"], entry["is_gate_open"]) == (None, True)
    streamed: dict[int, list[Any]] = {}
    for event in events(send(client, stream=True, **options)):
        for choice in event["choices"]:
            streamed.setdefault(choice["index"], []).extend(choice.get("control_trace", []))
    assert streamed == {choice["index"]: choice["control_trace"] for choice in body["choices"]}
    assert "control_trace" not in send(client, control=CONTROL).json()["choices"][0]
    assert "control_trace" not in send(client).json()["choices"][0]


def test_figures_that_are_not_finite_are_null(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    grow, broken = Choice.grow, [math.nan, math.inf, math.nan, math.inf, 0.0, 1.0, 1.0]
    monkeypatch.setattr(Choice, "grow", lambda choice, token_id, _, **more: grow(choice, token_id, broken, **more))
    for stream in (False, True):
        response = complete(client, control={**CONTROL, "trace": True}, max_tokens=2, stream=stream)
        assert response.status_code == 200
        assert response.text.count('"value_after":{"positive":null}') == 3
        assert response.text.count('"kl":null,"shift_ratio":null') == 2


@pytest.mark.parametrize("send", [complete, chat])
def test_a_guardrail_ends_a_response_with_a_reason_that_clients_know_and_the_detail_in_control(
    client: TestClient, send: Any
) -> None:
    guarded = {"control": {**CONTROL, "stop_below": {"plain": 0.6}}, "max_tokens": 4}
    whole = send(client, **guarded).json()
    assert [choice["finish_reason"] for choice in whole["choices"]] == ["content_filter"]
    assert whole["choices"][0]["control"]["stopped_by"] == {"plain": {"value": 0.5, "bound": 0.6}}
    assert whole["usage"]["completion_tokens"] == 1
    assert set(whole["choices"][0]["control"]["value_after"]) == {"positive", "plain"}
    streamed = events(send(client, stream=True, **guarded))
    assert [c["finish_reason"] for e in streamed for c in e["choices"] if c["finish_reason"]] == ["content_filter"]
    assert 'finished_reason="guardrail",model_name="fake"} 2.0' in client.get("/metrics").text
    assert "stopped_by" not in send(client, control=CONTROL, max_tokens=1).json()["choices"][0]["control"]


def test_a_guardrail_has_a_reason_of_its_own_where_a_setting_says_so(make_app: Callable[..., FastAPI]) -> None:
    guarded = {"control": {**CONTROL, "stop_below": {"plain": 0.6}}, "max_tokens": 4}
    with TestClient(make_app(settings={"guardrail_finish_reason": "guardrail"})) as client:
        assert complete(client, **guarded).json()["choices"][0]["finish_reason"] == "guardrail"
