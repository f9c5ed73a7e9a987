"""Forced calls of tools, with and without control: how many parse and hold their schemas.

python -m benchmarks.tool_calls --out benchmarks/results/tool-calls.json --into docs/http-api.md

Every request has `tool_choice: "required"` and a prompt and a seed of its own, the same in every arm. A call parses if
it is of a tool that there is, its arguments are JSON that holds the tool's schema, and nothing cut it off. Enter at
`main`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import jsonschema

from benchmarks.markdown import header, replace_sections, row
from benchmarks.speed.system import facts
from server.app import create_app
from server.settings import DEFAULT_MODEL, Settings

CONTROL = {"objective": {"weights": {"positive": 1.0}}, "max_kl": 0.3}
ARMS: dict[str, dict[str, Any] | None] = {
    "no control": None,
    "control": CONTROL,
    "control, `in_calls`": {**CONTROL, "in_calls": True},
}
_DAYS = ["monday", "tuesday", "wednesday", "thursday", "friday"]


def _tool(name: str, description: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [
    _tool(
        "get_weather",
        "The weather of a city.",
        city={"type": "string", "maxLength": 32},
        unit={"enum": ["celsius", "fahrenheit"]},
    ),
    _tool(
        "set_timer",
        "Rings after some minutes.",
        minutes={"type": "integer", "minimum": 1, "maximum": 240},
        label={"type": "string", "maxLength": 32},
    ),
    _tool(
        "add_event",
        "Puts an event into the calendar.",
        title={"type": "string", "maxLength": 48},
        day={"enum": _DAYS},
        hour={"type": "integer", "minimum": 0, "maximum": 23},
        guests={"type": "array", "items": {"type": "string", "maxLength": 24}, "maxItems": 3},
    ),
]
_SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
_PLACES = ["Bern", "Lagos", "Lima", "Oslo", "Kyoto", "Quito", "Turin", "Perth", "Cairo", "Dublin"]
_DISHES = ["rice", "the eggs", "bread", "a cake", "lentils"]
_MEETINGS = ["lunch with Ada", "a call with the bank", "the dentist", "a review of the draft", "tea with Grace"]


def prompts(number: int) -> list[str]:
    """So many that a user of the tools may send, of all kinds in turn."""
    weather = [f"How is the weather in {place}?" for place in _PLACES]
    timers = [f"Tell me when {dish} has cooked for {i + 5} minutes." for i, dish in enumerate(_DISHES)]
    events = [f"Put {what} on {day}." for what, day in zip(_MEETINGS, _DAYS, strict=True)]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(weather, timers, events))
    return list(itertools.islice(itertools.cycle([text for text in in_turn if text]), number))


def verdict(choice: Mapping[str, Any]) -> str | None:
    """Why a response's calls do not parse; None where they do."""
    calls = choice["message"].get("tool_calls")
    if not calls:
        return "no call"
    if choice["finish_reason"] != "tool_calls":
        return choice["finish_reason"]
    try:
        for call in calls:
            jsonschema.validate(json.loads(call["function"]["arguments"]), _SCHEMAS[call["function"]["name"]])
    except (KeyError, ValueError, jsonschema.ValidationError) as error:
        return f"{type(error).__name__}: {error}"[:200]
    return None


async def _ask(client: httpx.AsyncClient, prompt: str, seed: int, control: Mapping[str, Any] | None) -> dict[str, Any]:
    body = {
        "model": (await client.get("/v1/models")).json()["data"][0]["id"],
        "messages": [{"role": "user", "content": prompt}],
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 256,
        "temperature": 0.7,
        "top_p": 0.95,
        "seed": seed,
    }
    response = await client.post("/v1/chat/completions", json=body | ({"control": control} if control else {}))
    if response.is_error:
        raise RuntimeError(f"the server refused a request: {response.text}")
    return response.json()["choices"][0]


def summary(choices: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of an arm; `base` are the responses to the same requests without control."""
    failures = [problem for choice in choices if (problem := verdict(choice)) is not None]
    shares = [choice["control"]["controlled_share"] for choice in choices if "control" in choice]
    return {
        "num_requests": len(choices),
        "num_parsed": len(choices) - len(failures),
        "num_same_calls": sum(_calls(one) == _calls(other) for one, other in zip(choices, base, strict=True)),
        "controlled_share": sum(shares) / len(shares) if shares else 0.0,
        "failures": failures,
    }


def table(result: Mapping[str, Any]) -> str:
    lines = header(["control", "requests", "calls that parse", "the same calls as without control"])
    for name, arm in result["arms"].items():
        number = str(arm["num_requests"])
        lines.append(row([name, number, str(arm["num_parsed"]), str(arm["num_same_calls"])]))
    return "\n".join([*lines, "", f"{result['model']}, `{result['command']}`, {result['system']['date'][:10]}."])


def _calls(choice: Mapping[str, Any]) -> list[Any]:
    return [call["function"] for call in choice["message"].get("tool_calls") or []]


async def _measure(number: int, concurrency: int, model: str) -> dict[str, Any]:
    settings = {"model": model, "max_batch_size": concurrency, "log_level": "warning"}
    app = create_app(Settings.model_validate(settings))
    transport, gate = httpx.ASGITransport(app), asyncio.Semaphore(concurrency)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://x") as client:

        async def ask(seed: int, prompt: str, control: Mapping[str, Any] | None) -> dict[str, Any]:
            async with gate:
                return await _ask(client, prompt, seed, control)

        by_arm = {
            name: await asyncio.gather(*(ask(seed, text, control) for seed, text in enumerate(prompts(number))))
            for name, control in ARMS.items()
        }
    base = by_arm["no control"]
    return {name: summary(choices, base) for name, choices in by_arm.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tool_calls", description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--num-requests", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--into", type=Path, help="page with a section bench-tool-calls")
    args = parser.parse_args(arguments)
    given = list(sys.argv[1:] if arguments is None else arguments)
    system = facts()
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.tool_calls", *given]),
        "model": Path(args.model).name,
        "settings": {"num_requests": args.num_requests, "temperature": 0.7, "top_p": 0.95, "control": CONTROL},
        "system": system,
        "arms": asyncio.run(_measure(args.num_requests, args.concurrency, args.model)),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.into is not None:
        replace_sections(args.into, {"bench-tool-calls": table(result)})


if __name__ == "__main__":
    main()
