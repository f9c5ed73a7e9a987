"""What is wrong with an answer. Pure functions of a plan and what its client saw.

The law: every accepted request ends exactly once, one that is refused gets its status and OpenAI's error body, and
nothing else comes. Enter at `problems_of`.
"""

from __future__ import annotations

import json
from typing import Any

from tests.soak.answers import DONE, ENDS, Answer, answer_of, documents
from tests.soak.bad_input import Refused
from tests.soak.bodies import CHAT, FUNCTIONS, RESPONSES, is_forced, limit_of
from tests.soak.plan import Planned
from tests.soak.seen import BUSY, Seen

_ERROR_KEYS = {"message", "type", "param", "code"}
_RESPONSE_ENDS = {"completed", "incomplete: max_output_tokens"}
_CUT = ("length", "content_filter", "incomplete: max_output_tokens", "incomplete: content_filter")


class _WrongAnswerError(Exception):
    """One thing that is wrong with an answer."""


def problems_of(planned: Planned, seen: Seen) -> list[str]:
    """Empty when all is as it must be."""
    try:
        if planned.refused is not None:
            _check_refused(planned.refused, seen)
        else:
            _check_served(planned, seen)
    except _WrongAnswerError as wrong:
        return [str(wrong)]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        return [f"an answer of another form than OpenAI's: {error!r}"]
    return []


def has_expired(seen: Seen) -> bool:
    """Whether the request's own deadline ended the answer."""
    ends = ('"deadline_exceeded"', '"response.failed"')
    return seen.status == 504 or any(end in event for event in seen.events[-2:] for end in ends)


def _check_refused(refused: Refused, seen: Seen) -> None:
    if seen.error is not None and refused.may_hang_up:
        return
    _need(seen.error is None, f"{refused.name}: no answer: {seen.error}")
    _need(seen.status == refused.status, f"{refused.name}: status {seen.status}, not {refused.status}: {seen.body}")
    error = _check_error_body(seen)
    _need(error["param"] == refused.param, f"{refused.name}: param {error['param']!r}, not {refused.param!r}")
    wanted = refused.code
    _need(wanted is None or error["code"] == wanted, f"{refused.name}: code {error['code']!r}, not {wanted!r}")


def _check_served(planned: Planned, seen: Seen) -> None:
    if planned.fault == "deadline" and seen.status == 504:
        _need(_check_error_body(seen)["code"] == "deadline_exceeded", "a 504 of another kind")
        return
    if seen.has_left and seen.status in (None, *BUSY):
        return  # It left before it was answered, or when it had only been asked to come again.
    _need(seen.error is None, f"the connection broke: {seen.error}")
    _need(seen.status == 200, f"status {seen.status}: {seen.body}")
    _need(seen.is_stream == planned.is_streamed, "streamed or whole, other than asked for")
    if planned.is_streamed:
        _need(not seen.strays, f"a line that is no event: {seen.strays[:1]}")
        check = _check_response_stream if planned.path == RESPONSES else _check_stream
        check(planned, seen)
    elif not seen.has_left:
        _check_choices(planned, answer_of(planned, seen))
        _check_whole(planned, json.loads(seen.body))


def _check_error_body(seen: Seen) -> dict[str, Any]:
    _need(seen.headers["content-type"] == "application/json", "an error that is not JSON")
    _need("x-request-id" in seen.headers, "an error without a request id")
    body = json.loads(seen.body)
    _need(set(body) == {"error"} and set(body["error"]) == _ERROR_KEYS, f"another body than OpenAI's: {body}")
    _need(bool(body["error"]["message"]), "an error that says nothing")
    return body["error"]


def _check_whole(planned: Planned, body: dict[str, Any]) -> None:
    if planned.path == RESPONSES:
        _check_response(planned, body)
        return
    _need([c["index"] for c in body["choices"]] == list(range(planned.num_choices)), "choices out of order")
    _need(body["object"] == ("chat.completion" if planned.path == CHAT else "text_completion"), "another object")
    _check_usage(planned, body["usage"])


def _check_stream(planned: Planned, seen: Seen) -> None:
    """Events, the end of each choice once, then usage if asked for, then `[DONE]` and nothing."""
    if not seen.has_left:
        _need(seen.events[-1:] == [DONE], "a stream without [DONE]")
    _need(seen.events.count(DONE) <= 1, "[DONE] twice")
    told = documents(seen)
    errors = [d["error"] for d in told if "error" in d]
    if errors:
        _need(planned.fault == "deadline" and len(errors) == 1, f"an error in mid-stream: {errors}")
        _need("error" in told[-1] and errors[0]["code"] == "deadline_exceeded", f"another error: {errors[0]}")
        told = told[:-1]
    _need(len({d["id"] for d in told}) <= 1, "several ids in one stream")
    ended: set[int] = set()
    for document in told:
        for choice in document["choices"]:
            _need(choice["index"] not in ended, f"choice {choice['index']} went on after its end")
            if choice["finish_reason"] is not None:
                ended.add(choice["index"])
    if errors or seen.has_left:
        return
    _check_choices(planned, answer_of(planned, seen))
    options = planned.body.get("stream_options") or {}
    last = [d for d in told if not d["choices"]]
    _need(len(last) == bool(options.get("include_usage")), "usage events other than asked for")
    if last:
        _need(last[0] is told[-1], "an event after the usage")
        _check_usage(planned, last[0]["usage"])
    if options.get("continuous_usage_stats"):
        _need(all(d["usage"] for d in told), "an event without usage")


def _check_response_stream(planned: Planned, seen: Seen) -> None:
    """Numbered events with names, of items that begin and end once each, and one end at the last."""
    events = documents(seen)
    kinds = [event["type"] for event in events]
    # Who leaves may have read an event's name and not the event.
    names = seen.names[: len(kinds)] if seen.has_left and len(seen.names) == len(kinds) + 1 else seen.names
    _need(names == kinds, "events of other names than their types")
    _need([event["sequence_number"] for event in events] == list(range(len(events))), "numbers out of order")
    begin = ["response.created", "response.in_progress"]
    _need(kinds[:2] == begin[: len(kinds)], f"a stream that begins with {kinds[:2]}")
    ends = [place for place, kind in enumerate(kinds) if kind in ENDS]
    if seen.has_left and not ends:
        return
    _need(ends == [len(kinds) - 1], f"a stream that ends with {kinds[-1:]}, and has ends at {ends}")
    response = events[-1]["response"]
    if kinds[-1] == "response.failed":
        _need(planned.fault == "deadline", f"a response that failed: {response['error']}")
        return
    for what in ("added", "done"):
        begun = [event["output_index"] for event in events if event["type"] == f"response.output_item.{what}"]
        _need(begun == list(range(len(response["output"]))), f"items {what}: {begun}")
    _check_choices(planned, answer_of(planned, seen))
    _check_response(planned, response)


def _check_response(planned: Planned, response: dict[str, Any]) -> None:
    _need(response["object"] == "response", "another object")
    given = response["usage"]
    renamed = {"prompt_tokens": given["input_tokens"], "completion_tokens": given["output_tokens"]}
    _check_usage(planned, {**renamed, "total_tokens": given["total_tokens"]})


def _check_choices(planned: Planned, answers: list[Answer]) -> None:
    reasons = _RESPONSE_ENDS if planned.path == RESPONSES else {"stop", "length", "tool_calls"}
    if planned.body.get("control", {}).get("stop_below"):
        reasons = reasons | {"content_filter", "incomplete: content_filter"}
    for index, answer in enumerate(answers):
        _need(answer.num_ends == 1, f"choice {index} ended {answer.num_ends} times")
        _need(answer.finish_reason in reasons, f"choice {index} ended with {answer.finish_reason!r}")
        _need((answer.control is not None) == planned.is_controlled, f"choice {index}: control other than asked for")
        _check_calls(planned, answer)
    if planned.body.get("echo") and isinstance(planned.body["prompt"], str):
        _need(all(answer.text.startswith(planned.body["prompt"]) for answer in answers), "echo without the prompt")


def _check_calls(planned: Planned, answer: Answer) -> None:
    """Calls of functions that were offered, with arguments that are JSON; nothing else where they are forced."""
    _need(all(name in FUNCTIONS for name, _ in answer.calls), f"calls of other functions: {answer.calls}")
    _need("tools" in planned.body or not answer.calls, "calls that nobody asked for")
    _need((answer.finish_reason != "tool_calls") or bool(answer.calls), "tool_calls without calls")
    if not is_forced(planned.body) or planned.body.keys() & {"stop", "stop_token_ids"}:
        return
    _need(not answer.text, f"a forced call with a text: {answer.text!r}")
    if answer.finish_reason in _CUT:
        return
    _need(bool(answer.calls), "a forced call that did not come")
    for _, arguments in answer.calls:
        json.loads(arguments)


def _check_usage(planned: Planned, usage: dict[str, int]) -> None:
    limit = planned.body[limit_of(planned.body)] * planned.num_choices
    _need(0 <= usage["completion_tokens"] <= limit, f"{usage['completion_tokens']} tokens, where {limit} were allowed")
    _need(usage["prompt_tokens"] > 0, "no prompt tokens")
    _need(usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"], "usage that does not add up")


def _need(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _WrongAnswerError(otherwise[:500])
