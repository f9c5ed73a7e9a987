"""The soak's judgement of /v1/responses and of calls of tools."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.soak import judge
from tests.soak.answers import answer_of
from tests.soak.plan import Planned
from tests.soak.seen import Seen

PLANNED = Planned(0, "/v1/responses", {"model": "m", "input": "hi", "max_output_tokens": 8, "stream": True})
USAGE = {"input_tokens": 2, "output_tokens": 3, "total_tokens": 5}
PART = {"type": "output_text", "text": "ab", "logprobs": []}
ITEM = {"type": "message", "content": [PART]}
RESPONSE: dict[str, Any] = {
    "object": "response", "status": "completed", "incomplete_details": None, "usage": USAGE, "output": [ITEM],
}  # fmt: skip
CREATED, GOES_ON = {"type": "response.created"}, {"type": "response.in_progress"}
ADDED = {"type": "response.output_item.added", "output_index": 0, "item": {"type": "message"}}
A, B = ({"type": "response.output_text.delta", "delta": text, "logprobs": []} for text in "ab")
DONE = {"type": "response.output_item.done", "output_index": 0, "item": ITEM}
END = {"type": "response.completed", "response": RESPONSE}
FAILED = {"type": "response.failed", "response": {"error": {"message": "m"}}}
RIGHT = [CREATED, GOES_ON, ADDED, A, B, DONE, END]


def streamed(*events: dict[str, Any], **more: Any) -> Seen:
    numbered = [json.dumps({**event, "sequence_number": i}) for i, event in enumerate(events)]
    names = [event["type"] for event in events]
    return Seen(200, {"content-type": "text/event-stream"}, events=numbered, names=names, **more)


def test_a_response_holds_the_same_streamed_and_whole() -> None:
    seen = streamed(*RIGHT)
    assert judge.problems_of(PLANNED, seen) == []
    plain = Planned(0, PLANNED.path, {**PLANNED.body, "stream": False})
    whole = Seen(200, {"content-type": "application/json"}, json.dumps(RESPONSE))
    assert judge.problems_of(plain, whole) == []
    assert answer_of(PLANNED, seen) == answer_of(plain, whole)


@pytest.mark.parametrize(
    ("events", "what"),
    [
        (RIGHT[1:], "begins with"),
        (RIGHT[:-1], "ends with"),
        ([*RIGHT, END], "ends at [6, 7]"),
        ([*RIGHT, A], "ends with"),
        ([CREATED, GOES_ON, ADDED, A, B, END], "items done: []"),
        ([CREATED, GOES_ON, ADDED, ADDED, A, B, DONE, END], "items added: [0, 0]"),
        ([CREATED, GOES_ON, ADDED, A, FAILED], "failed"),
    ],
)
def test_a_response_that_breaks_the_law_is_named(events: list[dict[str, Any]], what: str) -> None:
    (problem,) = judge.problems_of(PLANNED, streamed(*events))
    assert what in problem


def test_events_have_their_types_for_names_and_numbers_in_order() -> None:
    seen = streamed(*RIGHT)
    seen.names[2] = "x"
    assert "other names" in judge.problems_of(PLANNED, seen)[0]
    seen = streamed(*RIGHT)
    seen.events[2], seen.events[3] = seen.events[3], seen.events[2]
    assert judge.problems_of(PLANNED, seen) != []


def test_a_response_that_was_left_or_ran_out_of_time_needs_no_end() -> None:
    assert judge.problems_of(PLANNED, streamed(CREATED, GOES_ON, ADDED, A, has_left=True)) == []
    late = Planned(0, PLANNED.path, PLANNED.body, fault="deadline")
    assert judge.problems_of(late, streamed(CREATED, GOES_ON, FAILED)) == []
    assert judge.has_expired(streamed(CREATED, GOES_ON, FAILED))


TOOLS = [{"type": "function", "function": {"name": "weather"}}]
FORCED = {"model": "m", "messages": [], "max_tokens": 50, "tools": TOOLS, "tool_choice": "required"}


def called(arguments: str, *, content: str | None = None, reason: str = "tool_calls", name: str = "weather") -> Seen:
    calls = [{"function": {"name": name, "arguments": arguments}}] if name else []
    message = {"content": content, "tool_calls": calls}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    body = {"object": "chat.completion", "choices": [choice], "usage": usage}
    return Seen(200, {"content-type": "application/json"}, json.dumps(body))


@pytest.mark.parametrize(
    ("seen", "what"),
    [
        (called('{"city": '), "another form"),
        (called("{}", content="Hm."), "with a text"),
        (called("", name=""), "tool_calls without calls"),
        (called("", name="", reason="stop"), "did not come"),
        (called("{}", name="other"), "other functions"),
    ],
)
def test_a_forced_call_that_is_none_is_named(seen: Seen, what: str) -> None:
    planned = Planned(0, "/v1/chat/completions", FORCED)
    assert judge.problems_of(planned, called("{}")) == []
    assert judge.problems_of(planned, called('{"ci', reason="length")) == []
    (problem,) = judge.problems_of(planned, seen)
    assert what in problem


@pytest.mark.parametrize(("has_left", "num_names", "is_right"), [(True, 1, True), (True, 2, False), (False, 1, False)])
def test_who_leaves_may_have_read_a_name_and_not_its_event(has_left: bool, num_names: int, is_right: bool) -> None:
    seen = streamed(CREATED, GOES_ON, has_left=has_left)
    seen.names += ["response.output_item.added"] * num_names
    assert (judge.problems_of(PLANNED, seen) == []) is is_right
