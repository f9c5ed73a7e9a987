"""The bodies that real clients send, as they build them, and what they need of the answers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

PROMPT = "Tell me about noodles."
OPENAI = {"model": "fake", "messages": [{"role": "user", "content": PROMPT}]}
GUIDELLM_STREAM = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
PARTS = [{"type": "text", "text": PROMPT}]
VLLM_STREAM = {"stream": True, "stream_options": {"include_usage": True}}

GOLDEN: dict[str, tuple[str, dict[str, Any]]] = {
    "openai sdk, every field it has in common": (
        "/v1/chat/completions",
        {
            **OPENAI, "frequency_penalty": 0, "logit_bias": {"50": -100}, "logprobs": True, "max_completion_tokens": 6,
            "n": 2, "presence_penalty": 0.5, "seed": 7, "stop": ["\n\n"], "stream": False, "temperature": 0.7,
            "top_logprobs": 2, "top_p": 0.9, "user": "u-1",
        },
    ),
    "openai sdk, legacy completions": (
        "/v1/completions",
        {"model": "fake", "prompt": PROMPT, "echo": True, "logprobs": 1, "max_tokens": 6, "stop": None, "user": "u-1"},
    ),
    "guidellm, text": (
        "/v1/completions",
        {"model": "fake", **GUIDELLM_STREAM, "max_tokens": 6, "stop": None, "ignore_eos": True, "prompt": PROMPT},
    ),
    "guidellm, chat": (
        "/v1/chat/completions",
        {
            "model": "fake", **GUIDELLM_STREAM, "max_completion_tokens": 6, "stop": None, "ignore_eos": True,
            "messages": [{"role": "user", "content": PARTS}],
        },
    ),
    "aiperf, text": (
        "/v1/completions",
        {"prompt": [PROMPT], "model": "fake", "max_tokens": 6, **VLLM_STREAM},
    ),
    "aiperf, chat": (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "name": None, "content": PROMPT}], "model": "fake", "stream": True,
            "max_completion_tokens": 6, "stream_options": {"include_usage": True},
        },
    ),
    "vllm bench, text": (
        "/v1/completions",
        {
            "model": "fake", "prompt": PROMPT, "repetition_penalty": 1.0, "max_tokens": 6, "logprobs": None,
            **VLLM_STREAM, "ignore_eos": True, "temperature": 0.0,
        },
    ),
    "vllm bench, chat": (
        "/v1/chat/completions",
        {
            "model": "fake", "messages": [{"role": "user", "content": PARTS}], "max_completion_tokens": 6,
            **VLLM_STREAM, "ignore_eos": True,
        },
    ),
    "lm-eval, loglikelihood": (
        "/v1/completions",
        {
            "model": "fake", "prompt": [[104, 105, 106], [107, 108]], "temperature": 0, "max_tokens": 1, "logprobs": 1,
            "seed": 1234, "echo": True,
        },
    ),
    "lm-eval, generate_until": (
        "/v1/completions",
        {
            "model": "fake", "prompt": [[104, 105], [106, 107]], "max_tokens": 6, "temperature": 0.0, "seed": 1234,
            "stop": ["\n\n", "\nQ:", "Question:", "</s>", "<|im_end|>", "###"], "top_p": 1.0, "num_beams": 1,
        },
    ),
    "lm-eval, chat": (
        "/v1/chat/completions",
        {
            "model": "fake", "messages": [{"role": "user", "content": PROMPT, "type": "text"}], "max_tokens": 6,
            "temperature": 0, "seed": 1234, "stop": [],
        },
    ),
    "llmperf": (
        "/v1/chat/completions",
        {
            "model": "fake", "messages": [{"role": "system", "content": ""}, {"role": "user", "content": PROMPT}],
            "stream": True, "max_tokens": 6,
        },
    ),
}  # fmt: skip


def post(client: TestClient, name: str) -> Any:
    path, body = GOLDEN[name]
    response = client.post(path, json=body, headers={"Authorization": "Bearer none"})
    assert response.status_code == 200, response.text
    return response


def events(client: TestClient, name: str) -> list[dict[str, Any]]:
    lines = [line for line in post(client, name).text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.mark.parametrize("name", GOLDEN)
def test_the_body_is_served(client: TestClient, name: str) -> None:
    _, body = GOLDEN[name]
    if not body.get("stream"):
        assert all(choice["finish_reason"] for choice in post(client, name).json()["choices"])
        return
    streamed = events(client, name)
    texts = [choice.get("text") or choice["delta"]["content"] for event in streamed for choice in event["choices"]]
    assert len("".join(texts)) == 6
    assert not any("error" in event for event in streamed)


def test_guidellm_looks_at_health_and_models_first_and_reads_usage_from_every_event(client: TestClient) -> None:
    assert client.get("/health").status_code == 200
    assert client.get("/v1/models").json()["data"][0]["id"] == "fake"
    for name in ("guidellm, text", "guidellm, chat"):
        counts = [event["usage"]["completion_tokens"] for event in events(client, name)]
        assert counts == [1, 2, 3, 4, 5, 6, 6]


def test_aiperf_finds_the_format_by_object_and_the_usage_at_the_end(client: TestClient) -> None:
    for name, kind in (("aiperf, text", "text_completion"), ("aiperf, chat", "chat.completion.chunk")):
        streamed = events(client, name)
        assert {event["object"] for event in streamed} == {kind}
        assert streamed[-1]["usage"]["completion_tokens"] == 6
        assert all(event["usage"] is None for event in streamed[:-1])


def test_vllms_benchmark_needs_the_usage_in_an_event_without_choices(client: TestClient) -> None:
    for name in ("vllm bench, text", "vllm bench, chat"):
        *tokens, last = events(client, name)
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 6
        assert all(len(event["choices"]) == 1 for event in tokens)


def test_llmperf_reads_the_delta_of_the_first_choice_of_every_event(client: TestClient) -> None:
    assert all("delta" in event["choices"][0] and "usage" not in event for event in events(client, "llmperf"))


def test_lm_eval_finds_a_score_for_each_token_of_a_prompt_and_whether_it_is_the_likeliest(client: TestClient) -> None:
    for prompt, choice in zip(GOLDEN["lm-eval, loglikelihood"][1]["prompt"], lm_eval_choices(client), strict=True):
        scores = choice["logprobs"]
        assert len(scores["token_logprobs"]) == len(scores["top_logprobs"]) == len(prompt) + 1
        assert (scores["token_logprobs"][0], scores["top_logprobs"][0]) == (None, None)
        for logprob, top in zip(scores["token_logprobs"][1:], scores["top_logprobs"][1:], strict=True):
            assert logprob in top.values()


def lm_eval_choices(client: TestClient) -> list[dict[str, Any]]:
    return sorted(post(client, "lm-eval, loglikelihood").json()["choices"], key=lambda choice: choice["index"])
