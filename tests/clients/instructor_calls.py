"""Run by test_frameworks.py in an environment with instructor: calls a server and prints what came, as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any, Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel, ConfigDict

ANSWER = {"role": "assistant", "content": '{"colour": "red", "ripe": true}'}
QUESTION = {"role": "user", "content": "Tell me the colour of a fruit, and whether it is ripe."}
# A small model does as it did, and without that writes the schema of the mode JSON once more.
MESSAGES = [QUESTION, ANSWER, QUESTION, ANSWER, QUESTION]
MODES = ("TOOLS", "TOOLS_STRICT", "JSON_SCHEMA", "JSON")


class Fruit(BaseModel):
    """A fruit."""

    colour: Literal["red", "green"]
    ripe: bool


class ClosedFruit(Fruit):
    """A fruit."""

    model_config = ConfigDict(extra="forbid")


def ask(url: str, model: str, mode: str) -> dict[str, Any]:
    client = instructor.from_openai(OpenAI(base_url=url, api_key="none"), mode=instructor.Mode[mode])
    options: Any = {"model": model, "messages": MESSAGES, "max_tokens": 80, "temperature": 0, "max_retries": 0}
    # A schema that allows more fields lets a small model write them without end, and on some processors it does.
    kind = ClosedFruit if mode == "JSON_SCHEMA" else Fruit
    whole = client.create(response_model=kind, **options)
    *_, last = client.create_partial(response_model=kind, **options)
    return {"whole": whole.model_dump(), "streamed": last.model_dump()}


if __name__ == "__main__":
    print(json.dumps({mode: ask(*sys.argv[1:], mode) for mode in MODES}))
