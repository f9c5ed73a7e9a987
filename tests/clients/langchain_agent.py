"""Run by test_langchain.py in an environment with langchain: an agent with a tool, and its messages as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, Literal

from langchain.agents import create_agent
from langchain.agents.middleware import ModelRequest, ModelResponse, wrap_model_call
from langchain_core.messages import ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

CONTROL = {"control": {"objective": {"weights": {"positive": 1.0}}, "max_kl": 0.3}}
ASKED = {"messages": [{"role": "user", "content": "What is the weather in Paris?"}]}


@tool
def get_weather(city: Literal["Paris", "London"]) -> str:
    """Tell the weather in a city."""
    return f"It rains in {city}."


@wrap_model_call
def call_once(request: ModelRequest, handler: Callable[[ModelRequest], ModelResponse]) -> ModelResponse:
    """A model of this size does not see when to call, so it is told to, until there is a result."""
    has_result = isinstance(request.messages[-1], ToolMessage)
    return handler(request.override(tool_choice="none" if has_result else "required"))


class Weather(BaseModel):
    """The weather somewhere."""

    city: Literal["Paris", "London"]


def chat(url: str, model: str, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(model=model, base_url=url, api_key="none", max_tokens=40, temperature=0, **options)


def agent(*where: str, **options: Any) -> Any:
    return create_agent(chat(*where, **options), [get_weather], middleware=[call_once])


def streamed(runner: Any) -> list[Any]:
    """The messages of an agent that reads its model's events."""
    *_, last = runner.stream(ASKED, stream_mode="values")
    return last["messages"]


if __name__ == "__main__":
    turns = {
        "whole": agent(*sys.argv[1:]).invoke(ASKED)["messages"],
        "streamed": streamed(agent(*sys.argv[1:], streaming=True)),
        "controlled": agent(*sys.argv[1:], extra_body=CONTROL).invoke(ASKED)["messages"],
    }
    told: dict[str, Any] = {name: [message.model_dump() for message in turn] for name, turn in turns.items()}
    by_call = chat(*sys.argv[1:]).with_structured_output(Weather, method="function_calling")
    told["structured"] = by_call.invoke("What is the weather in Paris?").model_dump()
    print(json.dumps(told))
