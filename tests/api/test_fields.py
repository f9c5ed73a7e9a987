"""Every field of a body reaches the engine, and what crosses several of them agrees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from server.api.resolution import resolve_control
from server.api.schemas import ChatBody, CompletionBody
from server.control.objectives import MAX_UNITS_PER_REQUEST
from server.control.params import ControlParams
from server.engines.base import EngineInfo
from server.errors import InvalidRequestError
from server.types import GenerationRequest
from tests.api.conftest import chat, complete, recording

FIELDS: dict[str, tuple[Any, Any]] = {
    "max_tokens": (3, 3),
    "temperature": (0.5, 0.5),
    "top_p": (0.9, 0.9),
    "top_k": (7, 7),
    "min_p": (0.1, 0.1),
    "seed": (-4, -4),
    "stop": ("ab", ("ab",)),
    "stop_token_ids": ([7, 8], (7, 8)),
    "ignore_eos": (True, True),
    "logit_bias": ({"7": 2, "8": -1.5}, {7: 2.0, 8: -1.5}),
    "presence_penalty": (1, 1.0),
    "frequency_penalty": (-0.5, -0.5),
    "repetition_penalty": (1.2, 1.2),
}
NOT_SAMPLING = {"model", "prompt", "messages", "n", "echo", "logprobs", "top_logprobs", "stream", "stream_options",
                "user", "safety_identifier", "metadata", "prompt_cache_key", "parallel_tool_calls", "reasoning_effort",
                "include_reasoning",
                "add_generation_prompt", "continue_final_message", "add_special_tokens", "chat_template_kwargs",
                "timeout_s", "control", "max_completion_tokens", "response_format", "best_of",
                "structured_outputs", "guided_json", "guided_choice", "tools", "tool_choice"}  # fmt: skip


@pytest.fixture
def seen(make_app: Callable[..., FastAPI]) -> Iterator[tuple[TestClient, list[GenerationRequest]]]:
    with recording(make_app()) as client_and_requests:
        yield client_and_requests


def test_no_field_is_left_out_here() -> None:
    assert set(CompletionBody.model_fields) | set(ChatBody.model_fields) == set(FIELDS) | NOT_SAMPLING


@pytest.mark.parametrize("send", [complete, chat])
@pytest.mark.parametrize("name", FIELDS)
def test_a_sampling_field_reaches_the_engine(
    seen: tuple[TestClient, list[GenerationRequest]], name: str, send: Callable[..., Any]
) -> None:
    client, requests = seen
    value, expected = FIELDS[name]
    assert send(client, **{"max_tokens": 2, name: value}).status_code == 200
    assert getattr(requests[0].sampling, name) == expected


@pytest.mark.parametrize("send", [complete, chat])
def test_fields_that_are_absent_or_null_mean_the_same(
    seen: tuple[TestClient, list[GenerationRequest]], send: Callable[..., Any]
) -> None:
    client, requests = seen
    send(client, max_tokens=2)
    send(client, **{**dict.fromkeys(FIELDS), "max_tokens": 2})
    assert requests[0].sampling == requests[1].sampling


def test_chat_counts_its_tokens_by_either_name(seen: tuple[TestClient, list[GenerationRequest]]) -> None:
    client, requests = seen
    chat(client, max_completion_tokens=5)
    chat(client, max_tokens=5)
    assert [request.sampling.max_tokens for request in requests] == [5, 5]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_logprobs_penalties_and_usage_agree_with_each_other(client: TestClient, stream: bool) -> None:
    options: dict[str, Any] = {
        "prompt": ["hi", "hello"], "n": 2, "echo": True, "logprobs": 1, "max_tokens": 3, "seed": 1,
        "logit_bias": {"101": 5}, "repetition_penalty": 1.1, "min_p": 0.1, "ignore_eos": True,
        "control": {"objective": {"weights": {"plain": 1.0}}},
    }  # fmt: skip
    body = complete(client, **options).json()
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 12, "total_tokens": 19}
    for choice in body["choices"]:
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
        assert choice["text"].startswith("hi" if choice["index"] < 2 else "hello")


@pytest.mark.parametrize("send", [complete, chat])
def test_seed_minus_one_asks_for_a_fresh_seed(
    seen: tuple[TestClient, list[GenerationRequest]], send: Callable[..., Any]
) -> None:
    client, requests = seen
    send(client, seed=-1, max_tokens=2)
    assert requests[0].sampling.seed is None


@pytest.mark.parametrize("temperature", [None, 0, 1.5])
def test_top_p_of_zero_draws_the_most_likely_token(
    seen: tuple[TestClient, list[GenerationRequest]], temperature: float | None
) -> None:
    client, requests = seen
    assert complete(client, top_p=0, temperature=temperature, max_tokens=2).status_code == 200
    assert (requests[0].sampling.temperature, requests[0].sampling.top_p) == (0.0, 1.0)


def test_any_of_64_stop_strings_ends_the_text(client: TestClient) -> None:
    whole = complete(client, max_tokens=20, seed=1).json()["choices"][0]["text"]
    stop = [*(f"never {i}" for i in range(63)), whole[9:12]]
    ended = complete(client, max_tokens=20, seed=1, stop=stop).json()["choices"][0]
    assert (ended["text"], ended["finish_reason"]) == (whole[: whole.index(stop[-1])], "stop")


@pytest.mark.parametrize(("value", "adds"), [(None, True), (True, True), (False, False)])
def test_a_completion_says_whether_the_tokenizer_adds_its_own_tokens(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, value: bool | None, adds: bool
) -> None:
    seen: list[bool] = []
    app: Any = client.app
    engine = app.state.engine
    encode = engine.encode

    def record(text: str, *, add_special_tokens: bool = True) -> list[int]:
        seen.append(add_special_tokens)
        return encode(text)

    monkeypatch.setattr(engine, "encode", record)
    assert complete(client, prompt=["a", "b"], max_tokens=1, add_special_tokens=value).status_code == 200
    assert seen == [adds, adds]


def test_nothing_is_added_to_token_ids(client: TestClient) -> None:
    assert complete(client, prompt=[104], max_tokens=1, add_special_tokens=False).status_code == 200
    error = complete(client, prompt=[104], add_special_tokens=True).json()["error"]
    assert error["param"] == "add_special_tokens"


def test_a_stop_token_ends_the_text(client: TestClient) -> None:
    whole = complete(client, max_tokens=20, seed=1).json()["choices"][0]["text"]
    ended = complete(client, max_tokens=20, seed=1, stop_token_ids=[ord(whole[4])]).json()["choices"][0]
    assert ended["text"] == whole[: whole.index(whole[4])]
    assert ended["finish_reason"] == "stop"


def test_a_bias_for_a_token_outside_the_vocabulary_is_named(client: TestClient) -> None:
    error = complete(client, logit_bias={"300": 1}).json()["error"]
    assert error["param"] == "logit_bias"
    assert "token id 300 is outside the vocabulary, 0 to 255" in error["message"]


def test_tokenize_and_detokenize_are_each_others_inverse(client: TestClient) -> None:
    body = client.post("/tokenize", json={"model": "fake@plain", "prompt": "hé", "return_token_strs": True}).json()
    assert body == {
        "count": 3,
        "max_model_len": 4096,
        "tokens": [104, 195, 169],
        "token_strs": ["h", "\ufffd", "\ufffd"],
    }
    assert client.post("/detokenize", json={"tokens": body["tokens"]}).json() == {"prompt": "hé"}
    assert client.post("/tokenize", json={"prompt": ""}).json()["count"] == 0
    messages = [{"role": "user", "content": "hi"}]
    tokens = client.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": "user: hi\n"}


def test_what_a_tokenizer_does_not_have_is_told_as_null(client: TestClient) -> None:
    info = client.get("/tokenizer_info").json()
    assert (info["eos_token"], info["chat_template"], info["model_max_length"]) == (None, None, 4096)


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "x"}]}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": False}, 400, "add_generation_prompt"),
        ("/tokenize", {"prompt": "a", "chat_template_kwargs": {}}, 400, "chat_template_kwargs"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "x"}], "continue_final_message": True},
            400,
            "continue_final_message",
        ),
        ("/tokenize", {"prompt": ["a"]}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "nope"}, 404, "model"),
        ("/tokenize", {"prompt": "a", "chat_template": "x"}, 400, "chat_template"),
        ("/detokenize", {"tokens": [256]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": [True]}, 400, "tokens"),
        ("/detokenize", {"tokens": [1] * 131_073}, 413, None),
    ],
)
def test_what_cannot_be_tokenized_is_refused_by_name(
    client: TestClient, path: str, body: dict[str, Any], status: int, param: str | None
) -> None:
    response = client.post(path, json=body)
    assert response.status_code == status
    assert (response.json()["error"]["param"] or "").startswith(param or "")


def test_heads_of_many_units_are_not_used_together() -> None:
    """A server keeps the inner products of all units that a request uses."""
    cards = {name: {"architecture": {"num_units": MAX_UNITS_PER_REQUEST - 1}} for name in ("one", "two")}
    info = EngineInfo("m", 100, 10, {**cards, "small": {}})
    for weights, is_allowed in (({"one": 1.0, "small": 1.0}, True), ({"one": 1.0, "two": 1.0}, False)):
        body = CompletionBody.model_validate(
            {"model": "m", "prompt": "x", "control": {"objective": {"weights": weights}}}
        )
        if is_allowed:
            assert resolve_control(body, info, None) is not None
            continue
        with pytest.raises(InvalidRequestError, match="units together") as raised:
            resolve_control(body, info, None)
        assert raised.value.param == "control.objective.weights"


def test_heads_of_many_units_are_not_used_beside_pinned_ones_by_a_models_name_either() -> None:
    cards = {name: {"architecture": {"num_units": MAX_UNITS_PER_REQUEST - 1}} for name in ("one", "two")}
    info = EngineInfo("m", 100, 10, cards)
    body = CompletionBody.model_validate({"model": "m@one", "prompt": "x"})
    assert resolve_control(body, info, None) is not None
    with pytest.raises(InvalidRequestError, match="units together") as raised:
        resolve_control(body, info, ControlParams.for_head("two"))
    assert raised.value.param == "model"
