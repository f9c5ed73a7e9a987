"""OpenAI's Agents SDK and LangChain on /v1/responses, with a function that is called and answered for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from tests.api.conftest import serving
from tests.clients.conftest import python_of, run_client

pytestmark = pytest.mark.clients


@pytest.fixture
def answers(make_app: Callable[..., FastAPI], tmp_path: Path) -> dict[str, Any]:
    python = python_of(".venv-clients", "agents")
    with serving(make_app()) as url:
        script = Path(__file__).with_name("responses_calls.py")
        return json.loads(run_client([python, script, f"{url}/v1"], cwd=tmp_path))


def test_agents_and_chains_call_a_function_and_go_on(answers: dict[str, Any]) -> None:
    agents, chain = answers["agents"], answers["langchain"]
    assert agents["items"] == agents["streamed"] == ["ToolCallItem", "ToolCallOutputItem", "MessageOutputItem"]
    assert agents["texts"][0]
    assert agents["texts"][0] == agents["texts"][1]
    assert agents["last"] == "response.completed"
    assert agents["again"]
    assert chain["text"] == chain["streamed"]
    assert (chain["status"], chain["usage"]["output_tokens"]) == ("incomplete", 6)
    assert chain["calls"] == ["clock"]
    assert chain["answer"]
    assert chain["again"] != chain["text"]
