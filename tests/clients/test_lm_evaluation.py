"""lm-eval gives by a server what it gives by transformers, and the page shows what the default model's run found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from tests.api.conftest import serving
from tests.clients.conftest import python_of
from tests.clients.lm_evaluation.agreement import CHAT, SCORED, WAYS, compared, measure, table
from tests.clients.lm_evaluation.command import RESULT, SECTION
from tests.pages.pages import section, text_of

NOISE_NATS = 1e-3
"""Of float32 sums over hundreds of tokens."""


def check(result: dict[str, Any]) -> None:
    """Every request of every task, by every way of asking."""
    assert list(result["server"]) == [*WAYS, "chats, one at a time"]
    for way, tasks in result["server"].items():
        assert list(tasks) == ([*SCORED, "answers"] if way in WAYS else [CHAT])
        for found in tasks.values():
            assert found["num_same"] == found["num_requests"] > 0
            assert (found["largest_difference_nats"] or 0.0) < NOISE_NATS


@pytest.mark.clients
def test_every_request_agrees_with_transformers_on_a_tiny_model(
    make_embedded_app: Callable[..., FastAPI], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    python = python_of(".venv-clients", "lm_eval")
    with serving(make_embedded_app()) as url:
        check(measure(python, url, "tiny", model_folder(), dtype="float32", work=tmp_path))


def test_the_page_shows_what_the_default_models_run_found() -> None:
    result = json.loads(RESULT.read_text())
    check(result)
    assert section(text_of("docs/clients.md"), SECTION) == table(result)


def test_what_differs_is_counted() -> None:
    def found(*answers: Any) -> dict[str, Any]:
        return {"task": {"metrics": {"acc": 1.0}, "answers": list(answers)}}

    scored = compared(found([-1.0, True], [-2.5, False]), found([-1.0, True], [-2.0, True]))["task"]
    assert (scored["num_same"], scored["num_requests"], scored["largest_difference_nats"]) == (1, 2, 0.5)
    texts = compared(found("a", "b"), found("a", "c"))["task"]
    assert (texts["num_same"], texts["largest_difference_nats"]) == (1, None)
    rolling = compared(found(-9.0), found(-10.0))["task"]
    assert (rolling["num_same"], rolling["largest_difference_nats"]) == (0, 1.0)
