"""The object that answers POST /v1/responses: what was asked, as the server took it, and what has come of it.

Enter at `Answer`.
"""

from __future__ import annotations

import time
from typing import Any, Literal

from server.api.responses.body import ResponseBody
from server.api.responses.tools import shown_choice
from server.types import Usage

Status = Literal["in_progress", "completed", "incomplete", "failed"]
_ERROR_CODES = {"rate_limit_error": "rate_limit_exceeded", "invalid_request_error": "invalid_prompt"}
"""By the type of the error's body; anything else is a server_error. OpenAI's clients know no other codes here."""


class Answer:
    """One response. It is told several times while it is streamed; what was asked is always the same."""

    def __init__(self, body: ResponseBody, request_id: str) -> None:
        self._head = {"id": f"resp_{request_id}", "object": "response", "created_at": int(time.time())}
        self._asked = _echoed(body)

    def told(
        self,
        status: Status,
        output: list[dict[str, Any]],
        *,
        usage: Usage | None = None,
        reason: str | None = None,
        error: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The whole object. `reason` says why it is incomplete; `error` is what the body of an error holds."""
        return {
            **self._head,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": None if error is None else _shown_error(error),
            "incomplete_details": None if reason is None else {"reason": reason},
            **self._asked,
            "output": output,
            "usage": None if usage is None else _shown_usage(usage),
        }


def _echoed(body: ResponseBody) -> dict[str, Any]:
    """The request's fields, with the defaults where there is null."""
    wanted = None if body.text is None else body.text.format
    shown_format = {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True, exclude_unset=True)
    return {
        "model": body.model,
        "instructions": body.instructions,
        "background": False,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": shown_format, "verbosity": "medium"},
        "tool_choice": shown_choice(body.tool_choice),
        "tools": [tool.shown for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _shown_error(error: dict[str, Any]) -> dict[str, Any]:
    return {"code": _ERROR_CODES.get(error["type"], "server_error"), "message": error["message"]}


def _shown_usage(usage: Usage) -> dict[str, Any]:
    """What comes out of a cache is counted like the rest."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }
