"""Bodies of requests that are served, drawn at random: completions, chats and responses, with every field.

Knows nothing of faults (plan.py) and of what must come back (judge.py). Enter at `draw`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.soak.control import draw_control

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
LOGPROBS = "message.output_text.logprobs"
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
"""Fields that say how many new tokens; a body has one of them."""
_PROMPT_CHARS = 100
_MAX_NEW_TOKENS = 20
_MAX_CALL_TOKENS = 96
"""Enough for a forced call even where a token is a byte."""
_TOOLS_LEN = 1536
"""Of a model with room for what tools are told by, where a token is a byte."""
_STOPS = ("\n", " the", ".", "e", "and then", "zebra", "\n\n")
_CITIES = {"type": "string", "enum": ["Bern", "Oslo", "Rome"]}
_WEATHER = {
    "name": "weather",
    "description": "tell the weather",
    "parameters": {"type": "object", "properties": {"city": _CITIES}, "required": ["city"]},
}
_NOW = {"name": "now", "description": "tell the time"}
FUNCTIONS = (_WEATHER["name"], _NOW["name"])
_YES_OR_NO = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}


@dataclass(slots=True, frozen=True)
class World:
    """What the server that is asked has."""

    model: str
    max_len: int
    heads: Mapping[str, tuple[float, float]]
    """Name -> mean and scale of its reward."""
    texts: Sequence[str]
    """Prompts."""

    @property
    def has_tools(self) -> bool:
        """Whether functions fit into a prompt."""
        return self.max_len >= _TOOLS_LEN


def draw(rng: random.Random, world: World) -> tuple[str, dict[str, Any]]:
    """A path and a body for it."""
    path = rng.choices([COMPLETIONS, CHAT, RESPONSES], weights=[50, 32, 18])[0]
    body: dict[str, Any] = {"model": world.model, "seed": rng.randrange(-(2**63), 2**63), "user": "soak"}
    makers = {COMPLETIONS: _completion, CHAT: _chat, RESPONSES: _response}
    body |= makers[path](rng, world) | _sampling(rng)
    if path == RESPONSES:
        body.pop("n", None)
    if rng.random() < 0.5:
        body["stream"] = True
        if path != RESPONSES and rng.random() < 0.5:
            body["stream_options"] = {"include_usage": True, "continuous_usage_stats": rng.random() < 0.3}
    if world.heads and rng.random() < 0.6:
        if rng.random() < 0.15:
            body["model"] = f"{world.model}@{rng.choice(sorted(world.heads))}"
        else:
            body["control"] = draw_control(rng, world.heads)
    if is_held(body):
        # What holds the text says where it ends.
        body.pop("ignore_eos", None)
    return path, body


def is_forced(body: Mapping[str, Any]) -> bool:
    """Whether the whole text is to be calls of tools."""
    return body.get("tool_choice") not in (None, "auto", "none")


def is_held(body: Mapping[str, Any]) -> bool:
    """Whether a grammar holds the text."""
    is_strict = any((tool.get("function") or tool).get("strict") for tool in body.get("tools", ()))
    return is_forced(body) or is_strict or bool(body.keys() & {"response_format", "guided_choice", "text"})


def limit_of(body: Mapping[str, Any]) -> str:
    """The field that says how many new tokens."""
    return next(name for name in LIMITS if name in body)


def _completion(rng: random.Random, world: World) -> dict[str, Any]:
    forms: list[Callable[[], Any]] = [
        lambda: _text(rng, world),
        lambda: _text(rng, world),
        lambda: [_text(rng, world) for _ in range(rng.randint(1, 3))],
        lambda: _token_ids(rng),
        lambda: [_token_ids(rng) for _ in range(rng.randint(1, 3))],
    ]
    body: dict[str, Any] = {"prompt": rng.choice(forms)(), "max_tokens": rng.randint(1, _MAX_NEW_TOKENS)}
    if rng.random() < 0.25:
        body["logprobs"] = rng.randint(0, 5)
    if rng.random() < 0.2:
        body["echo"] = True
        if rng.random() < 0.3:
            body["max_tokens"] = 0
    elif rng.random() < 0.08:
        body["guided_choice"] = ["yes", "no", "perhaps"]
    return body


def _chat(rng: random.Random, world: World) -> dict[str, Any]:
    messages = [{"role": "user", "content": _text(rng, world)}]
    if rng.random() < 0.3:
        messages.insert(0, {"role": "system", "content": "Answer in one sentence."})
    if rng.random() < 0.2:
        messages += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
    limit = rng.choice(["max_tokens", "max_completion_tokens"])
    body: dict[str, Any] = {"messages": messages, limit: rng.randint(1, _MAX_NEW_TOKENS)}
    if rng.random() < 0.25:
        body |= {"logprobs": True, "top_logprobs": rng.randint(0, 5)}
    # A model that does not reason takes it too.
    if rng.random() < 0.2:
        body["include_reasoning"] = rng.random() < 0.5
    if world.has_tools and rng.random() < 0.25:
        body |= _tools(rng, limit, lambda function: {"type": "function", "function": function})
        if rng.random() < 0.3:
            body["messages"] = [*messages, *_asked_and_told()]
    elif rng.random() < 0.1:
        schema = {"name": "answer", "schema": _YES_OR_NO}
        body |= {"response_format": {"type": "json_schema", "json_schema": schema}, limit: _MAX_NEW_TOKENS}
    return body


def _asked_and_told() -> list[dict[str, Any]]:
    """A call of a tool, and what it gave."""
    function = {"name": "weather", "arguments": '{"city": "Bern"}'}
    call = {"id": "call_1", "type": "function", "function": function}
    return [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]


def _response(rng: random.Random, world: World) -> dict[str, Any]:
    text = _text(rng, world)
    forms: list[Any] = [text, [{"role": "user", "content": text}]]
    forms.append([{"role": "user", "content": [{"type": "input_text", "text": text}]}])
    limit = "max_output_tokens"
    body: dict[str, Any] = {"input": rng.choice(forms), limit: rng.randint(1, _MAX_NEW_TOKENS)}
    if rng.random() < 0.3:
        body["instructions"] = "Answer in one sentence."
    if rng.random() < 0.25:
        body |= {"include": [LOGPROBS], "top_logprobs": rng.randint(0, 5)}
    if world.has_tools and rng.random() < 0.3:
        body |= _tools(rng, limit, lambda function: {"type": "function", **function})
        if rng.random() < 0.3:
            call = {"call_id": "call_1", "name": "weather", "arguments": '{"city": "Bern"}'}
            told = {"type": "function_call_output", "call_id": "call_1", "output": "rain"}
            body["input"] = [{"role": "user", "content": text}, {"type": "function_call", **call}, told]
    elif rng.random() < 0.1:
        wanted = {"type": "json_schema", "name": "answer", "schema": _YES_OR_NO}
        body |= {"text": {"format": wanted}, limit: _MAX_NEW_TOKENS}
    return body


def _tools(rng: random.Random, limit: str, offered: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Functions, and whether the model must call them; `offered` is how the route writes one."""
    named = {"type": "function", "name": "weather"}
    if "function" in offered(_NOW):
        named = {"type": "function", "function": {"name": "weather"}}
    choice = rng.choice([None, "auto", "none", "required", named])
    weather = {**_WEATHER, **({"strict": True} if choice == "auto" and rng.random() < 0.5 else {})}
    body: dict[str, Any] = {"tools": [offered(weather), offered(_NOW)]}
    if choice is not None:
        body["tool_choice"] = choice
    body[limit] = rng.choice([4, _MAX_NEW_TOKENS, _MAX_CALL_TOKENS if is_forced(body) else _MAX_NEW_TOKENS])
    if rng.random() < 0.7:
        body["parallel_tool_calls"] = False
    return body


def _sampling(rng: random.Random) -> dict[str, Any]:
    """Each field in some requests, whatever the others are."""
    fields: dict[str, tuple[float, Callable[[], Any]]] = {
        "temperature": (0.8, lambda: rng.choice([0, 0.7, 1.0, 1.5])),
        "top_p": (0.2, lambda: rng.choice([0.5, 0.9, 1])),
        "top_k": (0.2, lambda: rng.choice([-1, 0, 1, 40])),
        "min_p": (0.15, lambda: rng.choice([0, 0.05, 0.5])),
        "n": (0.2, lambda: rng.choice([1, 2, 2, 3, 4])),
        "stop": (0.25, lambda: rng.choice([None, rng.choice(_STOPS), rng.sample(_STOPS, rng.randint(1, 4))])),
        "stop_token_ids": (0.1, lambda: rng.sample(range(256), 3)),
        "ignore_eos": (0.2, lambda: rng.random() < 0.5),
        "logit_bias": (0.1, lambda: {str(rng.randrange(256)): rng.uniform(-5, 5) for _ in range(3)}),
        "presence_penalty": (0.15, lambda: rng.uniform(-2, 2)),
        "frequency_penalty": (0.15, lambda: rng.uniform(-2, 2)),
        "repetition_penalty": (0.15, lambda: rng.uniform(0.5, 2)),
    }
    return {name: draw() for name, (share, draw) in fields.items() if rng.random() < share}


def _text(rng: random.Random, world: World) -> str:
    """A few beginnings come again and again, so that pages of them are shared; some are of odd characters."""
    if rng.random() < 0.05:
        return rng.choice(["\x00", "é" * 30, "🙂🙃" * 8, "<|im_end|>", " ", "\u202e abc", "a" * 120])
    text = rng.choice(world.texts)[:_PROMPT_CHARS]
    return (world.texts[0] + " " + text)[:_PROMPT_CHARS] if rng.random() < 0.3 else text


def _token_ids(rng: random.Random) -> list[int]:
    """Of the first 256, which any vocabulary has."""
    return [rng.randrange(256) for _ in range(rng.choice([1, 7, 64, 65, 90]))]
