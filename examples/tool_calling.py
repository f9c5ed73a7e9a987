"""A turn of an agent: the model calls a tool, this program runs it, and the model answers under control.

Control leaves calls alone, so the objective changes what is said and not what is called. The default model is too small
for this: its call is forced, and what it says of the result is mostly nonsense. Leave `tool_choice` out for a model
that was trained with tools.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from openai import OpenAI

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 32},
                    "unit": {"enum": ["celsius", "fahrenheit"]},
                },
                "required": ["city", "unit"],
            },
        },
    }
]


def get_weather(city: str, unit: str) -> str:
    """Made up; an agent would ask someone."""
    return json.dumps({"city": city, "temperature": 4 if unit == "celsius" else 39, "unit": unit, "sky": "clear"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--question", default="How is the weather in Bern?")
    args = parser.parse_args()
    client = OpenAI(base_url=f"{args.url}/v1", api_key="none")
    control = {"control": {"objective": {"weights": {"positive": 1.0}}, "max_kl": 0.3}}
    options: Any = {"model": args.model, "tools": TOOLS, "temperature": 0.7, "seed": 1, "extra_body": control}
    messages: Any = [{"role": "user", "content": args.question}]
    called = client.chat.completions.create(
        messages=messages, tool_choice="required", parallel_tool_calls=False, max_tokens=128, **options
    )
    message = called.choices[0].message
    messages.append(message)
    for call in message.tool_calls or []:
        assert call.type == "function"
        result = get_weather(**json.loads(call.function.arguments))
        print(f"{call.function.name}({call.function.arguments}) -> {result}")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    answer = client.chat.completions.create(messages=messages, tool_choice="none", max_tokens=64, **options)
    print(answer.choices[0].message.content)


if __name__ == "__main__":
    main()
