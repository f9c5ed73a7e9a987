"""Run by test_frameworks.py in an environment with LlamaIndex: calls a server and prints what came, as JSON."""

# No postponed annotations: LlamaIndex reads those of `pick`.
import asyncio
import json
import sys
from typing import Any, Literal

from llama_index.core import PromptTemplate
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

PROMPT = PromptTemplate("Pick a fruit.")
CHAT = [ChatMessage(role="user", content="Name a fruit.")]


class Fruit(BaseModel):
    """A fruit."""

    colour: Literal["red", "green"]


def pick(colour: Literal["red", "green"]) -> str:
    """Pick a fruit."""
    return f"a {colour} one"


async def main(url: str, model: str) -> dict[str, Any]:
    options: Any = {"model": model, "api_base": url, "api_key": "none", "max_tokens": 8, "temperature": 0}
    options |= {"context_window": 8192, "max_retries": 0}
    chat = OpenAILike(**options, is_chat_model=True)
    completion = OpenAILike(**options, is_chat_model=False)
    tools = OpenAILike(**{**options, "max_tokens": 60}, is_chat_model=True, is_function_calling_model=True)
    called = tools.chat_with_tools([FunctionTool.from_defaults(pick)], "Pick a fruit.", tool_required=True)
    return {
        "chat": chat.chat(CHAT).message.content,
        "streamed": "".join(part.delta or "" for part in chat.stream_chat(CHAT)),
        "async": (await chat.achat(CHAT)).message.content,
        "completion": completion.complete("The sky is").text,
        "completion_streamed": "".join(part.delta or "" for part in completion.stream_complete("The sky is")),
        "calls": [call.tool_kwargs for call in tools.get_tool_calls_from_response(called)],
        "structured": tools.structured_predict(Fruit, PROMPT).model_dump(),
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(*sys.argv[1:]))))
