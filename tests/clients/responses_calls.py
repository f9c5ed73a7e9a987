"""Run by test_responses.py in an environment with openai-agents and langchain-openai: calls /v1/responses as these do
and prints what came, as JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from agents import Agent, ModelSettings, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI

CONTROL = {"control": {"objective": {"weights": {"positive": 1.0}}}}
# The fake engine's letters end so, and calls of `clock` have none of these.
ENDING = {"seed": 1, "stop": ["h", "i", "d"]}


async def agents(url: str) -> dict[str, Any]:
    set_tracing_disabled(True)
    model = OpenAIResponsesModel(model="fake", openai_client=AsyncOpenAI(base_url=url, api_key="none"))

    @function_tool
    def clock() -> str:
        """Tell the time."""
        return "noon"

    settings = ModelSettings(tool_choice="required", top_logprobs=2, extra_body={**ENDING, **CONTROL})
    agent = Agent(name="one", instructions="be kind", model=model, tools=[clock], model_settings=settings)
    talker = Agent(name="two", model=model, model_settings=ModelSettings(extra_body=ENDING))
    whole = await Runner.run(agent, "what time is it?")
    streamed = Runner.run_streamed(agent, "what time is it?")
    kinds = [event.data.type async for event in streamed.stream_events() if event.type == "raw_response_event"]
    history = [*whole.to_input_list(), {"role": "user", "content": "and now?"}]
    return {
        "items": [type(item).__name__ for item in whole.new_items],
        "streamed": [type(item).__name__ for item in streamed.new_items],
        "texts": [whole.final_output, streamed.final_output],
        "last": kinds[-1],
        "again": (await Runner.run(talker, history)).final_output,
        "usage": whole.context_wrapper.usage.output_tokens,
    }


def langchain(url: str) -> dict[str, Any]:
    options: dict[str, Any] = {"model": "fake", "base_url": url, "api_key": "none", "use_responses_api": True}
    chat = ChatOpenAI(**options, max_tokens=6, extra_body={"seed": 1, **CONTROL})

    @tool
    def clock() -> str:
        """Tell the time."""
        return "noon"

    whole = chat.invoke("hi")
    chunks = list(chat.stream("hi"))
    caller = ChatOpenAI(**options, extra_body=ENDING).bind_tools([clock], tool_choice="required")
    called = caller.invoke("what time is it?")
    history = [HumanMessage("what time is it?"), called, *(clock.invoke(call) for call in called.tool_calls)]
    return {
        "text": whole.text,
        "streamed": "".join(chunk.text for chunk in chunks),
        "usage": whole.usage_metadata,
        "status": whole.response_metadata["status"],
        "calls": [call["name"] for call in called.tool_calls],
        "answer": chat.invoke(history).text,
        "again": chat.invoke([HumanMessage("hi"), whole, HumanMessage("more")]).text,
    }


if __name__ == "__main__":
    print(json.dumps({"agents": asyncio.run(agents(sys.argv[1])), "langchain": langchain(sys.argv[1])}))
