"""Fields of OpenAI's and vLLM's that are not served: what asks for nothing is taken, the rest is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.api.unserved import CHAT, COMPLETION, GENERATION, RESPONSE
from tests.api.conftest import chat, complete, respond

OF_ROUTES = {complete: COMPLETION, chat: CHAT, respond: RESPONSE}
ASKING: dict[str, Any] = {
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "store": True,
    "service_tier": "priority",
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy"},
    "guided_regex": "a+",
    "guided_grammar": "root ::= a",
    "prediction": {"type": "content", "content": "x"},
    "verbosity": "low",
    "web_search_options": {},
    "moderation": {"model": "x"},
    "prompt_cache_retention": "24h",
    "prompt_cache_options": {"mode": "explicit"},
    "documents": [{"text": "x"}],
    "use_beam_search": True,
    "num_beams": 2,
    "length_penalty": 1.5,
    "min_tokens": 1,
    "bad_words": ["x"],
    "allowed_token_ids": [],
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": 1,
    "truncate_prompt_tokens": 5,
    "prompt_logprobs": 0,
    "return_tokens_as_token_ids": True,
    "return_token_ids": True,
    "priority": 1,
    "suffix": "x",
    "messages": [],
    "prompt": "x",
    "best_of": 2,
    "echo": True,
    "chat_template": "",
    "previous_response_id": "resp_1",
    "previous_response": {"id": "resp_1"},
    "previous_input_messages": [{"role": "user", "content": "x"}],
    "conversation": "conv_1",
    "background": True,
    "background_options": {"completion_window": "2h"},
    "truncation": "auto",
    "context_management": [{"type": "compaction"}],
    "access_programs": {"cyber": "standard"},
    "image": {"context_compression": "auto"},
    "enable_response_messages": True,
    "n": 2,
    "max_tokens": 3,
    "max_completion_tokens": 3,
    "response_format": {"type": "json_object"},
    "reasoning_effort": "low",
    "logprobs": True,
}


def senders(name: str) -> list[Callable[..., Any]]:
    return [send for send, fields in OF_ROUTES.items() if name in fields]


def texts_of(response: Any) -> list[Any]:
    """Of each choice, or of the one message."""
    content = response.json()
    if "choices" in content:
        return content["choices"]
    return [part["text"] for item in content.get("output", []) for part in item["content"]]


def test_every_field_is_asked_for_here() -> None:
    assert ASKING.keys() == (COMPLETION | CHAT | RESPONSE).keys()
    assert GENERATION.keys() == COMPLETION.keys() & CHAT.keys()
    assert GENERATION.keys() <= RESPONSE.keys()


@pytest.mark.parametrize("name", ASKING)
def test_a_value_that_asks_for_nothing_changes_nothing(client: TestClient, name: str) -> None:
    for send in senders(name):
        asked = {"seed": 1, "max_output_tokens" if send is respond else "max_tokens": 3}
        plain = texts_of(send(client, **asked))
        assert plain
        for value in [None, *OF_ROUTES[send][name].harmless]:
            assert texts_of(send(client, **{**asked, name: value})) == plain, value


@pytest.mark.parametrize("name", ASKING)
def test_a_value_that_asks_for_something_is_refused_with_the_reason(client: TestClient, name: str) -> None:
    for send in senders(name):
        response = send(client, **{name: ASKING[name]})
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["param"], error["code"]) == (name, "unsupported_field")
        assert error["message"].startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("store", 0, "store"),
        ("priority", False, "priority"),
        ("parallel_tool_calls", 1, "parallel_tool_calls"),
        ("metadata", {str(i): "x" for i in range(17)}, "metadata"),
        ("metadata", {"k": 3}, "metadata.k"),
        ("metadata", {"k": "x" * 513}, "metadata.k"),
        ("safety_identifier", "x" * 257, "safety_identifier"),
        ("prompt_cache_key", 3, "prompt_cache_key"),
        ("reasoning_effort", "extreme", "reasoning_effort"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(client: TestClient, name: str, value: Any, field: str) -> None:
    response = chat(client, **{name: value})
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize(
    "fields",
    [
        {"parallel_tool_calls": True},
        {"parallel_tool_calls": False},
        {"metadata": {"project": "x"}, "store": False},
        {"safety_identifier": "someone", "prompt_cache_key": "a"},
    ],
    ids=str,
)
def test_what_the_sdks_add_changes_no_text(client: TestClient, fields: dict[str, Any]) -> None:
    plain = chat(client, seed=1, max_tokens=3).json()["choices"]
    assert chat(client, seed=1, max_tokens=3, **fields).json()["choices"] == plain


def test_events_are_not_padded(client: TestClient) -> None:
    whole = chat(client, stream=True, max_tokens=2, stream_options={"include_obfuscation": False})
    assert whole.status_code == 200
    error = chat(client, stream=True, stream_options={"include_obfuscation": True}).json()["error"]
    assert error["param"] == "stream_options.include_obfuscation"
