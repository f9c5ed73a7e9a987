"""What is wrong with an answer, and what an answer holds. Pure functions of a plan and what its client saw.

The law: every accepted request ends exactly once, one that is refused gets its status and OpenAI's error body, and
nothing else comes. Enter at `problems_of`; `answer_of` gives what two runs of one request are compared by.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.soak.bad_input import Refused
from tests.soak.client import Seen
from tests.soak.plan import CHAT, Planned

_DONE = "[DONE]"
_ERROR_KEYS = {"message", "type", "param", "code"}


class _WrongAnswerError(Exception):
    """One thing that is wrong with an answer."""


@dataclass(slots=True)
class Answer:
    """One choice."""

    text: str = ""
    tokens: list[str] = field(default_factory=list)
    """Those whose log-probabilities were asked for."""
    finish_reason: str | None = None
    control: dict[str, Any] | None = None
    num_ends: int = 0


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


def answer_of(planned: Planned, seen: Seen) -> list[Answer]:
    """What each choice holds, as far as the client read it, streamed or not."""
    answers = [Answer() for _ in range(planned.num_choices)]
    for document in _documents(seen):
        for choice in document.get("choices", ()):
            answer = answers[choice["index"]]
            answer.text += _text(choice)
            answer.tokens += _tokens(choice, is_chat=planned.path == CHAT)
            answer.control = choice.get("control", answer.control)
            if choice["finish_reason"] is not None:
                answer.finish_reason = choice["finish_reason"]
                answer.num_ends += 1
    return answers


def difference(ours: list[Answer], solo: list[Answer], *, is_whole: bool) -> str | None:
    """How two runs differ; of one that was left before its end, the beginning counts."""
    for index, (mine, alone) in enumerate(zip(ours, solo, strict=True)):
        if not is_whole:
            # What was held back for a stop string may be given out at the end only.
            if not alone.text.startswith(mine.text) or alone.tokens[: len(mine.tokens)] != mine.tokens:
                return f"choice {index} began {mine.text!r}, and alone {alone.text!r}"
        elif mine != alone:
            return f"choice {index} was {mine}, and alone {alone}"
    return None


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
    if seen.has_left and seen.status is None:
        return
    _need(seen.error is None, f"the connection broke: {seen.error}")
    _need(seen.status == 200, f"status {seen.status}: {seen.body}")
    _need(seen.is_stream == planned.is_streamed, "streamed or whole, other than asked for")
    if planned.is_streamed:
        _check_stream(planned, seen)
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
    _need([c["index"] for c in body["choices"]] == list(range(planned.num_choices)), "choices out of order")
    _need(body["object"] == ("chat.completion" if planned.path == CHAT else "text_completion"), "another object")
    _check_usage(planned, body["usage"])


def _check_stream(planned: Planned, seen: Seen) -> None:
    """Events, the end of each choice once, then usage if asked for, then `[DONE]` and nothing."""
    _need(not seen.strays, f"a line that is no event: {seen.strays[:1]}")
    if not seen.has_left:
        _need(seen.events[-1:] == [_DONE], "a stream without [DONE]")
    _need(seen.events.count(_DONE) <= 1, "[DONE] twice")
    documents = _documents(seen)
    errors = [d["error"] for d in documents if "error" in d]
    if errors:
        _need(planned.fault == "deadline" and len(errors) == 1, f"an error in mid-stream: {errors}")
        _need("error" in documents[-1] and errors[0]["code"] == "deadline_exceeded", f"another error: {errors[0]}")
        documents = documents[:-1]
    _need(len({d["id"] for d in documents}) <= 1, "several ids in one stream")
    ended: set[int] = set()
    for document in documents:
        for choice in document["choices"]:
            _need(choice["index"] not in ended, f"choice {choice['index']} went on after its end")
            if choice["finish_reason"] is not None:
                ended.add(choice["index"])
    if errors or seen.has_left:
        return
    _check_choices(planned, answer_of(planned, seen))
    options = planned.body.get("stream_options") or {}
    last = [d for d in documents if not d["choices"]]
    _need(len(last) == bool(options.get("include_usage")), "usage events other than asked for")
    if last:
        _need(last[0] is documents[-1], "an event after the usage")
        _check_usage(planned, last[0]["usage"])
    if options.get("continuous_usage_stats"):
        _need(all(d["usage"] for d in documents), "an event without usage")


def _check_choices(planned: Planned, answers: list[Answer]) -> None:
    reasons = {"stop", "length"} | ({"content_filter"} if planned.body.get("control", {}).get("stop_below") else set())
    for index, answer in enumerate(answers):
        _need(answer.num_ends == 1, f"choice {index} ended {answer.num_ends} times")
        _need(answer.finish_reason in reasons, f"choice {index} ended with {answer.finish_reason!r}")
        _need((answer.control is not None) == planned.is_controlled, f"choice {index}: control other than asked for")
    if planned.body.get("echo") and isinstance(planned.body["prompt"], str):
        _need(all(answer.text.startswith(planned.body["prompt"]) for answer in answers), "echo without the prompt")


def _check_usage(planned: Planned, usage: dict[str, int]) -> None:
    limit = planned.body.get("max_tokens", planned.body.get("max_completion_tokens", 0)) * planned.num_choices
    _need(0 <= usage["completion_tokens"] <= limit, f"{usage['completion_tokens']} tokens, where {limit} were allowed")
    _need(usage["prompt_tokens"] > 0, "no prompt tokens")
    _need(usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"], "usage that does not add up")


def _documents(seen: Seen) -> list[dict[str, Any]]:
    """Each JSON object of the answer, in order."""
    if seen.is_stream:
        return [json.loads(event) for event in seen.events if event != _DONE]
    return [json.loads(seen.body)] if seen.body else []


def _text(choice: dict[str, Any]) -> str:
    """Of a choice in any of the four forms."""
    if "text" in choice:
        return choice["text"]
    return (choice["message"] if "message" in choice else choice["delta"])["content"]


def _tokens(choice: dict[str, Any], *, is_chat: bool) -> Iterator[str]:
    logprobs = choice["logprobs"]
    if logprobs is not None:
        yield from (token["token"] for token in logprobs["content"]) if is_chat else logprobs["tokens"]


def _need(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _WrongAnswerError(otherwise[:500])
