"""Run by test_langchain.py in an environment with langchain-openai: calls a server and prints what came, as JSON."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from typing import Any, Literal

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

CONTROL = {"control": {"objective": {"weights": {"positive": 1.0}}, "max_kl": 0.3, "trace": True}}
MESSAGES = [SystemMessage("Be brief."), HumanMessage([{"type": "text", "text": "hi"}])]


class Review(BaseModel):
    """What a guest thought."""

    stars: Literal[1, 2, 3]
    reason: str = Field(max_length=6)


def only_this_machine() -> None:
    """Nothing may be downloaded on the way, such as tiktoken's tables."""
    connect = socket.socket.connect

    def checked(self: socket.socket, address: Any) -> None:
        assert address[0] == "127.0.0.1", f"a connection to {address}"
        connect(self, address)

    socket.socket.connect = checked  # type: ignore[method-assign]


async def completions(url: str) -> dict[str, Any]:
    options: dict[str, Any] = {"model": "tiny", "base_url": url, "api_key": "none", "max_tokens": 6, "seed": 1}
    plain, steered = OpenAI(**options), OpenAI(**options, extra_body=CONTROL)

    scored = OpenAI(**options, logprobs=2).generate(["hi"])
    return {
        "invoke": plain.invoke("hi"),
        "stream": "".join(plain.stream("hi")),
        "astream": "".join([part async for part in plain.astream("hi")]),
        "batch": plain.batch(["hi", "ho"]),
        "abatch": await plain.abatch(["hi", "ho"]),
        "controlled": steered.invoke("hi"),
        "stop": plain.invoke("hi", stop=["\n"]),
        "logprobs": scored.generations[0][0].generation_info,
        "usage": scored.llm_output,
    }


async def chats(url: str) -> dict[str, Any]:
    options: dict[str, Any] = {"model": "tiny", "base_url": url, "api_key": "none", "max_tokens": 6, "seed": 1}
    plain, steered = ChatOpenAI(**options), ChatOpenAI(**options, extra_body=CONTROL)
    long = ChatOpenAI(**{**options, "max_tokens": 120, "extra_body": CONTROL})

    parts, whole = list(ChatOpenAI(**options, stream_usage=True).stream(MESSAGES)), plain.invoke(MESSAGES)
    scored = plain.bind(logprobs=True, top_logprobs=2).invoke(MESSAGES)
    structured = long.with_structured_output(Review, method="json_schema").invoke(MESSAGES)
    as_dict = long.with_structured_output(Review.model_json_schema(), method="json_schema", strict=True)
    return {
        "invoke": whole.content,
        "finish": whole.response_metadata["finish_reason"],
        "usage": whole.usage_metadata,
        "stream": "".join(part.content for part in parts),
        "stream_usage": [part.usage_metadata for part in parts if part.usage_metadata],
        "astream": "".join([part.content async for part in plain.astream(MESSAGES)]),
        "batch": [answer.content for answer in plain.batch([MESSAGES, "ho"])],
        "controlled": steered.invoke(MESSAGES).content,
        "logprobs": scored.response_metadata["logprobs"]["content"],
        "structured": structured.model_dump(),
        "structured_dict": as_dict.invoke(MESSAGES),
        "raw": long.with_structured_output(Review, include_raw=True).invoke(MESSAGES)["raw"].content,
        "error": error_of(lambda: plain.bind(temperature=9).invoke(MESSAGES)),
        "too_long": error_of(lambda: plain.bind(max_tokens=9000).invoke(MESSAGES)),
    }


def error_of(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error")


async def main(url: str) -> None:
    # One event loop for all: LangChain shares its asynchronous connections between clients.
    print(json.dumps({"completions": await completions(url), "chats": await chats(url)}))


if __name__ == "__main__":
    only_this_machine()
    asyncio.run(main(sys.argv[1]))
