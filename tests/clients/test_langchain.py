"""LangChain's OpenAI classes against a tiny model: the same answers by every way of asking."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from server.settings import DEFAULT_MODEL
from tests.api.conftest import serving
from tests.clients.conftest import python_of, run_client, run_python

pytestmark = pytest.mark.clients


@pytest.fixture
def answers(make_embedded_app: Callable[..., FastAPI], tmp_path: Path) -> dict[str, Any]:
    python = python_of(".venv-clients", "langchain_openai")
    with serving(make_embedded_app()) as url:
        script = Path(__file__).with_name("langchain_calls.py")
        return json.loads(run_client([python, script, f"{url}/v1"], cwd=tmp_path))


def test_every_way_of_asking_gives_the_same_and_control_and_schemas_reach_it(answers: dict[str, Any]) -> None:
    texts, chats = answers["completions"], answers["chats"]
    for got in (texts, chats):
        assert got["invoke"] == got["stream"] == got["astream"] == got["batch"][0]
        assert got["invoke"] != got["batch"][1]
        assert got["invoke"] != got["controlled"]
    assert texts["abatch"] == texts["batch"]
    assert texts["stop"] == texts["invoke"].partition("\n")[0]
    assert texts["usage"]["token_usage"]["completion_tokens"] == 6
    assert len(texts["logprobs"]["logprobs"]["top_logprobs"]) == 6
    assert chats["finish"] == "length"
    assert chats["usage"]["output_tokens"] == 6
    assert [usage["output_tokens"] for usage in chats["stream_usage"]] == [6]
    assert [len(score["top_logprobs"]) for score in chats["logprobs"]] == [2] * 6
    for review in (chats["structured"], chats["structured_dict"], json.loads(chats["raw"])):
        assert review["stars"] in (1, 2, 3)
        assert len(review["reason"]) <= 6
    assert "Error code: 400" in chats["error"]
    assert "temperature: Input" in chats["error"]
    assert chats["too_long"].startswith("OpenAIContextOverflowError")


def test_an_agent_calls_its_tool_reads_the_result_and_answers(default_server: str, tmp_path: Path) -> None:
    turns = run_python(
        ".venv-clients", "langchain", "langchain_agent.py", f"{default_server}/v1", DEFAULT_MODEL, cwd=tmp_path
    )
    assert turns.pop("structured")["city"] in ("Paris", "London")
    for messages in turns.values():
        asked, called, result, answered = messages
        (call,) = called["tool_calls"]
        assert (asked["type"], call["name"]) == ("human", "get_weather")
        assert call["args"]["city"] in ("Paris", "London")
        assert (result["tool_call_id"], result["content"]) == (call["id"], f"It rains in {call['args']['city']}.")
        assert (answered["type"], answered["tool_calls"]) == ("ai", [])
        assert answered["content"]
