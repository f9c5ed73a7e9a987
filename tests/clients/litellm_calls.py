"""Run by test_litellm.py in an environment with litellm: calls a server by its SDK and prints what came, as JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any, Literal

import litellm
from pydantic import BaseModel

litellm.telemetry = False
litellm.suppress_debug_info = True
CONTROL = {"control": {"objective": {"weights": {"positive": 1.0}}, "max_kl": 0.3}}
MESSAGES = [{"role": "user", "content": "Name a fruit."}]

PARAMETERS = {"type": "object", "properties": {"colour": {"enum": ["red", "green"]}}, "required": ["colour"]}
TOOLS = [{"type": "function", "function": {"name": "pick", "description": "Pick a fruit.", "parameters": PARAMETERS}}]


class Fruit(BaseModel):
    colour: Literal["red", "green"]
    ripe: bool


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return type(error).__name__
    raise AssertionError("no error")


async def chats(asked: dict[str, Any], provider: str) -> dict[str, Any]:
    whole = litellm.completion(**asked)
    parts = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
    history = [*MESSAGES, whole.choices[0].message.model_dump(), *MESSAGES]
    parsed = litellm.completion(**{**asked, "max_tokens": 60}, response_format=Fruit)
    called = litellm.completion(**{**asked, "max_tokens": 60}, tools=TOOLS, tool_choice="required").choices[0]
    dropped = litellm.completion(**asked, additional_drop_params=["audio"], audio={})
    return {
        "whole": whole.choices[0].message.content,
        "finish": whole.choices[0].finish_reason,
        "usage": whole.usage.completion_tokens,
        "streamed": "".join(part.choices[0].delta.content or "" for part in parts),
        "streamed_usage": [part.usage.completion_tokens for part in parts if getattr(part, "usage", None)],
        "async": (await litellm.acompletion(**asked)).choices[0].message.content,
        "given_back": litellm.completion(**{**asked, "messages": history}).choices[0].finish_reason,
        "controlled": litellm.completion(**asked, extra_body=CONTROL).choices[0].message.content,
        "parsed": json.loads(parsed.choices[0].message.content),
        "called": json.loads(called.message.tool_calls[0].function.arguments),
        "dropped": dropped.choices[0].finish_reason,
        "errors": {
            "model": error_of(lambda: litellm.completion(**{**asked, "model": f"{provider}/nothing"})),
            "field": error_of(lambda: litellm.completion(**{**asked, "temperature": 9})),
            "context": error_of(lambda: litellm.completion(**{**asked, "max_tokens": 9000})),
        },
    }


def texts(asked: dict[str, Any]) -> dict[str, str]:
    parts = list(litellm.text_completion(**asked, stream=True))
    return {
        "whole": litellm.text_completion(**asked).choices[0].text,
        "streamed": "".join(part.choices[0].text or "" for part in parts),
    }


async def main(url: str, model: str) -> dict[str, Any]:
    options = {"api_base": url, "api_key": "none", "num_retries": 0, "max_tokens": 8, "temperature": 0}
    by_provider = {
        provider: await chats({**options, "model": f"{provider}/{model}", "messages": MESSAGES}, provider)
        for provider in ("openai", "hosted_vllm")
    }
    asked = {**options, "model": f"text-completion-openai/{model}", "prompt": "The sky is"}
    return {**by_provider, "text": texts(asked)}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(*sys.argv[1:]))))
