"""What an answer holds, whichever route it came from and whether it was streamed. Enter at `answer_of`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.soak.bodies import CHAT, RESPONSES
from tests.soak.plan import Planned
from tests.soak.seen import Seen

DONE = "[DONE]"
ENDS = ("response.completed", "response.incomplete", "response.failed")
"""Events that end a response's stream."""


@dataclass(slots=True)
class Answer:
    """One choice."""

    text: str = ""
    tokens: list[str] = field(default_factory=list)
    """Those whose log-probabilities were asked for."""
    finish_reason: str | None = None
    control: dict[str, Any] | None = None
    num_ends: int = 0
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)
    """Name and arguments of each."""

    def call(self, name: str | None, arguments: str) -> None:
        """A piece of a call: its name, which begins it, or more of its arguments, or both."""
        if name is not None:
            self.calls.append([name, ""])
        self.calls[-1][1] += arguments

    def begins(self, whole: Answer) -> bool:
        """Whether it is the beginning of another one, as far as it was read."""
        calls, others = "\n".join(map("".join, self.calls)), "\n".join(map("".join, whole.calls))
        pairs = ((self.text, whole.text), (self.reasoning, whole.reasoning), (calls, others))
        return all(other.startswith(mine) for mine, other in pairs) and (
            whole.tokens[: len(self.tokens)] == self.tokens
        )


def answer_of(planned: Planned, seen: Seen) -> list[Answer]:
    """What each choice holds, as far as the client read it."""
    if planned.path == RESPONSES:
        answer = Answer()
        for document in documents(seen):
            _grow_by_event(answer, document) if seen.is_stream else _fill(answer, document)
        return [answer]
    answers = [Answer() for _ in range(planned.num_choices)]
    for document in documents(seen):
        for choice in document.get("choices", ()):
            _grow(answers[choice["index"]], choice, is_chat=planned.path == CHAT)
    return answers


def difference(ours: list[Answer], solo: list[Answer], *, is_whole: bool) -> str | None:
    """How two runs differ; of one that was left before its end, the beginning counts."""
    for index, (mine, alone) in enumerate(zip(ours, solo, strict=True)):
        if not is_whole:
            # What was held back for a stop string may be given out at the end only.
            if not mine.begins(alone):
                return f"choice {index} began {mine}, and alone {alone}"
        elif mine != alone:
            return f"choice {index} was {mine}, and alone {alone}"
    return None


def documents(seen: Seen) -> list[dict[str, Any]]:
    """Each JSON object of the answer, in order."""
    if seen.is_stream:
        return [json.loads(event) for event in seen.events if event != DONE]
    return [json.loads(seen.body)] if seen.body else []


def _grow(answer: Answer, choice: dict[str, Any], *, is_chat: bool) -> None:
    """By a choice in any of the four forms."""
    if is_chat:
        said = choice["message"] if "message" in choice else choice["delta"]
        answer.text += said.get("content") or ""
        answer.reasoning += said.get("reasoning_content") or ""
        for call in said.get("tool_calls", ()):
            answer.call(call["function"].get("name"), call["function"]["arguments"])
    else:
        answer.text += choice["text"]
    answer.tokens += _tokens(choice, is_chat=is_chat)
    answer.control = choice.get("control", answer.control)
    if choice["finish_reason"] is not None:
        answer.finish_reason = choice["finish_reason"]
        answer.num_ends += 1


def _tokens(choice: dict[str, Any], *, is_chat: bool) -> Iterator[str]:
    logprobs = choice["logprobs"]
    if logprobs is not None:
        yield from (token["token"] for token in logprobs["content"]) if is_chat else logprobs["tokens"]


def _grow_by_event(answer: Answer, event: dict[str, Any]) -> None:
    kind = event.get("type", "").removeprefix("response.")
    if kind == "output_text.delta":
        answer.text += event["delta"]
        answer.tokens += [score["token"] for score in event["logprobs"]]
    elif kind == "reasoning_text.delta":
        answer.reasoning += event["delta"]
    elif kind == "output_item.added" and event["item"]["type"] == "function_call":
        answer.call(event["item"]["name"], "")
    elif kind == "function_call_arguments.delta":
        answer.call(None, event["delta"])
    elif event.get("type") in ENDS:
        _end(answer, event["response"])


def _fill(answer: Answer, response: dict[str, Any]) -> None:
    """By a response that came whole."""
    for item in response["output"]:
        if item["type"] == "function_call":
            answer.call(item["name"], item["arguments"])
            continue
        (part,) = item["content"]
        if item["type"] == "reasoning":
            answer.reasoning += part["text"]
        else:
            answer.text += part["text"]
            answer.tokens += [score["token"] for score in part["logprobs"]]
    _end(answer, response)


def _end(answer: Answer, response: dict[str, Any]) -> None:
    answer.finish_reason = response["status"]
    if response["incomplete_details"] is not None:
        answer.finish_reason = f"{response['status']}: {response['incomplete_details']['reason']}"
    answer.control = response.get("control")
    answer.num_ends += 1
