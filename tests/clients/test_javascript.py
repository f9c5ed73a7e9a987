"""OpenAI's SDK for JavaScript and Vercel's AI SDK against the default model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.settings import DEFAULT_MODEL
from tests.api.conftest import eventually
from tests.clients.conftest import run_javascript

pytestmark = pytest.mark.clients


def num_running(url: str) -> float:
    """Sequences that the server is at work on."""
    (line,) = re.findall(r"(?m)^recontrol_num_requests_running\S* (\S+)$", httpx.get(f"{url}/metrics").text)
    return float(line)


@pytest.fixture(scope="module")
def sdk(default_server: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cwd = tmp_path_factory.mktemp("openai")
    return run_javascript("openai", "openai_calls.mjs", f"{default_server}/v1", DEFAULT_MODEL, cwd=cwd)


def test_the_sdk_completes_and_chats_alike_by_every_way_of_asking(sdk: dict[str, Any]) -> None:
    assert {DEFAULT_MODEL, f"{DEFAULT_MODEL}@positive"} <= set(sdk["models"])
    completion, chat = sdk["completions"], sdk["chats"]
    assert completion["streamed"] == completion["whole"]["text"]
    assert len(completion["whole"]["logprobs"]["tokens"]) == completion["usage"]["completion_tokens"] == 8
    assert chat["whole"]["role"] == "assistant"
    assert chat["whole"]["content"] == chat["streamed"] == chat["helped"]
    assert chat["usage"]["completion_tokens"] == 8
    assert chat["request_id"]
    assert len(set(chat["several"])) == 2


def test_control_goes_into_the_body_and_its_summary_comes_back(sdk: dict[str, Any]) -> None:
    assert sdk["chats"]["control"]["mean_kl"] > 0
    assert sdk["chats"]["num_traced"] == 8


def test_zod_schemas_are_held_whole_and_streamed(sdk: dict[str, Any]) -> None:
    for fruit in sdk["parsed"].values():
        assert fruit["colour"] in ("red", "green")
        assert isinstance(fruit["ripe"], bool)


def test_tools_are_run_streamed_and_their_results_answered(sdk: dict[str, Any]) -> None:
    tools = sdk["tools"]
    assert tools["whole"] == tools["streamed"]
    assert {tools["whole"]["colour"], tools["run"]["colour"]} <= {"red", "green"}
    assert tools["finish_reason"] == "tool_calls"
    assert tools["answer"]


def test_our_errors_are_the_sdks_own(sdk: dict[str, Any]) -> None:
    errors = sdk["errors"]
    assert {name: error["type"] for name, error in errors.items()} == {
        "model": "NotFoundError",
        "field": "BadRequestError",
        "head": "NotFoundError",
        "timeout": "APIConnectionTimeoutError",
        "streamed": "BadRequestError",
    }
    assert [errors[name]["param"] for name in ("model", "field", "streamed")] == ["model", "temperature", "top_p"]
    assert all(error["is_api_error"] for error in errors.values())
    assert errors["field"]["request_id"]


def test_what_is_aborted_or_left_ends_there_and_frees_its_place(sdk: dict[str, Any], default_server: str) -> None:
    assert sdk["aborted"] == {"whole": "APIUserAbortError", "events": 3, "left": 3}
    assert eventually(lambda: num_running(default_server) == 0)


def test_the_ai_sdk_generates_and_streams_texts_and_objects(default_server: str, tmp_path: Path) -> None:
    answers = run_javascript("ai", "ai_sdk_calls.mjs", f"{default_server}/v1", DEFAULT_MODEL, cwd=tmp_path)
    whole, streamed = answers["whole"], answers["streamed"]
    assert (streamed["text"], streamed["finish"]) == (whole["text"], whole["finish"]) == (whole["text"], "length")
    assert streamed["usage"]["outputTokens"] == whole["usage"]["outputTokens"] == 8
    assert answers["system"] != whole["text"]
    assert answers["completion"]["text"]
    assert answers["steered"]["mean_kl"] > 0
    for fruit in (answers["object"], answers["streamed_object"]):
        assert fruit["colour"] in ("red", "green")
    for agent in (answers["agent"], answers["streamed_agent"]):
        assert agent["finish"] == "tool-calls"
        assert agent["output"] == f"The {agent['input']['colour']} one is ripe."
        assert agent["text"]
    assert (answers["error"]["is_call_error"], answers["error"]["status"]) == (True, 404)
