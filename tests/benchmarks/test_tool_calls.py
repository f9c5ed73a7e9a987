"""Forced calls: what counts as one that parses, and what was measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tool_calls import TOOLS, prompts, summary, verdict

RESULT = json.loads(Path("benchmarks/results/tool-calls.json").read_text())


def choice(arguments: str, *, name: str = "set_timer", finish_reason: str = "tool_calls") -> dict[str, Any]:
    call = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"message": {"content": None, "tool_calls": [call]}, "finish_reason": finish_reason}


WHOLE = choice('{"minutes": 5, "label": "rice"}')


@pytest.mark.parametrize(
    "other",
    [
        choice('{"minutes": 5, "label": "ri', finish_reason="length"),
        choice('{"minutes": 5, "label": "ri'),
        choice('{"minutes": 5}'),
        choice('{"minutes": 500, "label": "rice"}'),
        choice('{"minutes": 5, "label": "rice"}', name="set_alarm"),
        {"message": {"content": "hi"}, "finish_reason": "stop"},
    ],
    ids=lambda other: str(other["message"])[-40:],
)
def test_a_call_that_is_cut_or_holds_no_schema_does_not_parse(other: dict[str, Any]) -> None:
    assert verdict(WHOLE) is None
    assert verdict(other) is not None
    told = summary([WHOLE, other], [WHOLE, WHOLE])
    assert (told["num_requests"], told["num_parsed"], told["num_same_calls"]) == (2, 1, 1)


def test_there_are_prompts_for_every_tool_and_as_many_as_asked_for() -> None:
    asked = prompts(200)
    assert len(asked) == 200
    assert {text.split()[0] for text in asked[:3]} == {"How", "Tell", "Put"}
    assert len(TOOLS) == 3


def test_every_forced_call_of_the_default_model_parses_with_and_without_control() -> None:
    arms = RESULT["arms"]
    assert [(arm["num_requests"], arm["num_parsed"]) for arm in arms.values()] == [(200, 200)] * 3
    assert arms["control"]["num_same_calls"] == 200
