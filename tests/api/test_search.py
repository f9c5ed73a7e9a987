"""`best_of` and `control.search` over HTTP: what is accepted, what it costs, and what comes back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from server.api import resolution
from server.api.resolution import MAX_NEW_TOKENS
from server.types import GenerationRequest
from tests.api.conftest import chat, complete, eventually, recording
from tests.api.test_completions import events, joined

CONTROL: dict[str, Any] = {"objective": {"weights": {"positive": 1.0}}}
BLOCKS = {"type": "blocks", "candidates": 3, "block_tokens": 4}
SEARCHED = {**CONTROL, "search": BLOCKS}


@pytest.fixture
def seen(make_app: Callable[..., FastAPI]) -> Iterator[tuple[TestClient, list[GenerationRequest]]]:
    with recording(make_app()) as client_and_requests:
        yield client_and_requests


@pytest.fixture
def tiny(make_embedded_app: Callable[..., FastAPI]) -> Iterator[TestClient]:
    """Over a tiny random model, whose cache holds more than it needs, in four rows."""
    with TestClient(make_embedded_app()) as client:
        yield client


def error_of(response: Any) -> dict[str, Any]:
    assert response.status_code == 400, response.text
    return response.json()["error"]


@pytest.mark.parametrize("send", [complete, chat])
def test_a_search_reaches_the_engine_with_its_defaults(
    seen: tuple[TestClient, list[GenerationRequest]], send: Callable[..., Any]
) -> None:
    client, requests = seen
    assert send(client, max_tokens=2, control={**CONTROL, "search": {"type": "blocks"}, "steps": 0}).status_code == 200
    search = requests[0].search
    assert search is not None
    assert (search.candidates, search.block_tokens, requests[0].num_sequences) == (4, 8, 4)


def test_the_candidates_of_a_chat_share_the_tokens_that_one_body_may_ask_for(
    seen: tuple[TestClient, list[GenerationRequest]],
) -> None:
    client, requests = seen
    many = {**CONTROL, "search": {"type": "blocks", "candidates": 32}}
    assert chat(client, n=8, control=many, stop=["e"]).status_code == 200
    assert requests[0].sampling.max_tokens == MAX_NEW_TOKENS // (8 * 32)


def test_best_of_reaches_the_engine_unless_it_leaves_nothing_out(
    seen: tuple[TestClient, list[GenerationRequest]],
) -> None:
    client, requests = seen
    complete(client, n=2, best_of=5, control=CONTROL, max_tokens=2)
    complete(client, model="fake@positive", best_of=3, max_tokens=2)
    complete(client, n=2, best_of=2, stream=True, max_tokens=2)
    complete(client, best_of=1, max_tokens=2)
    assert [(r.num_choices, r.best_of, r.num_sequences) for r in requests] == [
        (2, 5, 5), (1, 3, 3), (2, None, 2), (1, None, 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"best_of": 3}, "needs control"),
        ({"best_of": 2, "n": 3, "control": CONTROL}, "must be n (3) or more"),
        ({"best_of": 3, "control": CONTROL, "stream": True}, "cannot be streamed"),
        ({"best_of": 3, "control": CONTROL, "max_tokens": 0, "echo": True}, "nothing to choose from"),
        ({"best_of": 3, "control": SEARCHED}, "not allowed with control.search"),
        ({"best_of": 5, "control": CONTROL, "prompt": ["hi"] * 64}, "64 prompts x best_of = 320 sequences"),
    ],
)
def test_a_best_of_that_means_nothing_is_refused_with_the_reason(
    client: TestClient, fields: dict[str, Any], reason: str
) -> None:
    error = error_of(complete(client, **fields))
    assert error["param"] == "best_of"
    assert error["message"].startswith("best_of: ")
    assert reason in error["message"]


def test_chat_has_no_best_of(client: TestClient) -> None:
    assert error_of(chat(client, best_of=2, control=CONTROL))["param"] == "best_of"


def test_candidates_count_among_the_sequences_and_tokens_of_a_body(client: TestClient) -> None:
    many = {**CONTROL, "search": {**BLOCKS, "candidates": 32}}
    error = error_of(complete(client, control=many, n=9))
    assert (error["param"], "1 prompts x n x candidates = 288" in error["message"]) == (
        "control.search.candidates",
        True,
    )
    error = error_of(complete(client, control=many, n=8, max_tokens=600))
    assert (error["param"], "256 sequences x 600 tokens" in error["message"]) == ("max_tokens", True)


def test_what_is_drawn_is_what_is_paid(make_app: Callable[..., FastAPI]) -> None:
    client: TestClient
    with TestClient(make_app(settings={"api_keys": "sk-test-0123456789", "tokens_per_minute": 100})) as client:
        client.headers["authorization"] = "Bearer sk-test-0123456789"
        usage = complete(client, control=SEARCHED, max_tokens=10, stop=["\n"]).json()["usage"]
        assert usage == {"prompt_tokens": 5, "completion_tokens": 30, "total_tokens": 35}
        usage = complete(client, control=CONTROL, best_of=5, n=2, max_tokens=10).json()["usage"]
        assert usage["completion_tokens"] == 50
        assert complete(client, max_tokens=10).status_code == 429


@pytest.mark.parametrize("send", [complete, chat])
def test_streamed_text_is_the_whole_text_and_comes_in_blocks(tiny: TestClient, send: Callable[..., Any]) -> None:
    options = {"model": "tiny", "control": {**SEARCHED, "trace": True}, "max_tokens": 22, "n": 1, "seed": 5,
               "logit_bias": {"256": -100, "257": -100}}  # fmt: skip
    whole = send(tiny, **options).json()
    response = send(tiny, stream=True, stream_options={"include_usage": True}, **options)
    (choice,) = whole["choices"]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    assert joined(response) == {0: text}
    assert events(response)[-1]["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] == 3 * 22
    traced = [entry for event in events(response) for c in event["choices"] for entry in c.get("control_trace", [])]
    assert traced == choice["control_trace"]
    assert len(traced) == 22


def test_echoed_log_probabilities_come_with_the_first_block(tiny: TestClient) -> None:
    options = {"model": "tiny", "control": SEARCHED, "max_tokens": 6, "echo": True, "logprobs": 1, "seed": 5}
    (whole,) = complete(tiny, **options).json()["choices"]
    streamed = [c["logprobs"] for e in events(complete(tiny, stream=True, **options)) for c in e["choices"]]
    for field in ("tokens", "token_logprobs", "text_offset"):
        assert [item for part in streamed for item in part[field]] == whole["logprobs"][field]


def test_best_of_gives_the_best_first_and_all_of_them_are_paid(tiny: TestClient) -> None:
    options = {"model": "tiny", "control": {**CONTROL, "steps": 0}, "max_tokens": 8, "seed": 2}
    all_of_them = complete(tiny, n=6, **options).json()
    best = complete(tiny, n=2, best_of=6, **options).json()
    texts = [choice["text"] for choice in all_of_them["choices"]]
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert {choice["text"] for choice in best["choices"]} < set(texts)
    assert best["usage"] == all_of_them["usage"]
    assert all(choice["control"]["value_after"].keys() == {"positive"} for choice in best["choices"])
    reordered = complete(tiny, n=1, best_of=6, **options).json()["choices"][0]
    assert reordered["text"] == best["choices"][0]["text"]


def test_a_search_goes_by_a_reward_that_the_operator_has_registered(make_embedded_app: Callable[..., FastAPI]) -> None:
    by_reward = {**CONTROL, "steps": 0, "search": {**BLOCKS, "block_tokens": 24, "reward": "terse"}}
    options = {"model": "tiny", "max_tokens": 24, "seed": 5, "logit_bias": {"256": -100, "257": -100}}
    with TestClient(make_embedded_app(search_rewards="plain,terse=brevity")) as client:
        tried = complete(client, **options, control={**CONTROL, "steps": 0}, n=1).json()["choices"][0]["text"]
        whole = complete(client, **options, control=by_reward).json()
        assert len(whole["choices"][0]["text"].split()) <= len(tried.split())
        assert joined(complete(client, **options, control=by_reward, stream=True)) == {0: whole["choices"][0]["text"]}
        assert whole["usage"]["completion_tokens"] == 3 * 24
        error = error_of(complete(client, **options, control={**CONTROL, "search": {**BLOCKS, "reward": "brevity"}}))
        assert (error["param"], "registered are plain, terse" in error["message"]) == ("control.search.reward", True)
        assert client.get("/v1/heads").json()["search_rewards"] == ["plain", "terse"]


@pytest.mark.parametrize(
    ("search", "max_tokens", "words"),
    [
        # Some 190 tokens at a time, 60 times.
        ({"candidates": 3, "block_tokens": 1}, 60, "scored in all"),
        ({"candidates": 4, "block_tokens": 24}, 60, "scored at a time"),
    ],
)
def test_a_search_has_no_more_scored_than_others_can_wait_for(
    make_embedded_app: Callable[..., FastAPI],
    monkeypatch: pytest.MonkeyPatch,
    search: dict[str, Any],
    max_tokens: int,
    words: str,
) -> None:
    monkeypatch.setattr(resolution, "MAX_SCORED_AT_ONCE", 220)
    monkeypatch.setattr(resolution, "MAX_SCORED_IN_ALL", 5000)
    asked = {"model": "tiny", "seed": 5, "control": {**CONTROL, "steps": 0, "search": {"type": "blocks", **search}}}
    by_reward = {**asked, "control": {**asked["control"], "search": {"type": "blocks", **search, "reward": "brevity"}}}
    with TestClient(make_embedded_app(search_rewards="brevity")) as client:
        error = error_of(complete(client, **by_reward, max_tokens=max_tokens))
        assert (error["param"], words in error["message"]) == ("control.search.reward", True)
        # What has no reward to ask is bounded by the tokens alone.
        assert complete(client, **asked, max_tokens=max_tokens).status_code == 200


def test_more_candidates_than_rows_are_refused_and_more_whole_responses_are_not(tiny: TestClient) -> None:
    error = error_of(complete(tiny, model="tiny", control={**SEARCHED, "search": {**BLOCKS, "candidates": 5}}))
    assert error["param"] == "control.search.candidates"
    assert complete(tiny, model="tiny", control=CONTROL, best_of=9).status_code == 200


def test_a_client_that_leaves_frees_all_candidates(tiny: TestClient) -> None:
    engine: Any = tiny.app.state.engine  # type: ignore[attr-defined]
    body = {"model": "tiny", "prompt": "hi", "max_tokens": 200, "control": SEARCHED, "timeout_s": 0.05}
    for more in ({}, {"control": CONTROL, "best_of": 4}):
        tiny.post("/v1/completions", content=json.dumps({**body, **more}))
        assert eventually(lambda: engine.status().num_running == 0)
        assert engine.status().kv_cache_usage == 0
    assert complete(tiny, model="tiny").status_code == 200


def test_the_document_describes_the_search(client: TestClient) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert schemas["Blocks"]["properties"]["candidates"]["maximum"] == 32
    assert schemas["Blocks"]["additionalProperties"] is False
    assert "best_of" in schemas["CompletionBody"]["properties"]
