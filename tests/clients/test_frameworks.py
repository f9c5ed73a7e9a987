"""instructor and LlamaIndex against the default model."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.settings import DEFAULT_MODEL
from tests.clients.conftest import run_python

pytestmark = pytest.mark.clients


def test_instructor_gets_its_models_by_every_mode_whole_and_streamed(default_server: str, tmp_path: Path) -> None:
    found = run_python(
        ".venv-clients", "instructor", "instructor_calls.py", f"{default_server}/v1", DEFAULT_MODEL, cwd=tmp_path
    )
    assert len(found) == 4
    for mode, answers in found.items():
        for fruit in answers.values():
            assert fruit["colour"] in ("red", "green"), mode
            assert isinstance(fruit["ripe"], bool), mode


def test_llama_index_asks_alike_by_every_way_and_calls_tools(default_server: str, tmp_path: Path) -> None:
    found = run_python(
        ".venv-litellm", "llama_index", "llama_index_calls.py", f"{default_server}/v1", DEFAULT_MODEL, cwd=tmp_path
    )
    assert found["chat"] == found["streamed"] == found["async"]
    assert found["completion"] == found["completion_streamed"]
    (call,) = found["calls"]
    assert {call["colour"], found["structured"]["colour"]} <= {"red", "green"}
