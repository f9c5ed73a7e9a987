"""Run by test_frameworks.py in an environment with instructor: calls a server and prints what came, as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any, Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel

MESSAGES = [{"role": "user", "content": "Name a fruit."}]
MODES = ("TOOLS", "TOOLS_STRICT", "JSON_SCHEMA", "JSON")


class Fruit(BaseModel):
    """A fruit."""

    colour: Literal["red", "green"]
    ripe: bool


def ask(url: str, model: str, mode: str) -> dict[str, Any]:
    client = instructor.from_openai(OpenAI(base_url=url, api_key="none"), mode=instructor.Mode[mode])
    options: Any = {"model": model, "messages": MESSAGES, "max_tokens": 80, "temperature": 0, "max_retries": 0}
    whole = client.create(response_model=Fruit, **options)
    *_, last = client.create_partial(response_model=Fruit, **options)
    return {"whole": whole.model_dump(), "streamed": last.model_dump()}


if __name__ == "__main__":
    print(json.dumps({mode: ask(*sys.argv[1:], mode) for mode in MODES}))
