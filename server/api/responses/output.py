"""The items of a response's output, and the events that tell how they grow. Enter at `Output`."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any, Literal

from server.types import FinishReason

Event = dict[str, Any]
ItemStatus = Literal["completed", "incomplete"]
INCOMPLETE = {FinishReason.LENGTH: "max_output_tokens", FinishReason.GUARDRAIL: "content_filter"}
"""Why a response is not whole, in OpenAI's words."""


class Output:
    """A message for now. Every change is told by events, which a response that is not streamed has no use for."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._part: dict[str, Any] | None = None
        """The open message's."""

    def add_text(
        self, text: str, logprobs: list[dict[str, Any]], trace: list[dict[str, Any]] | None = None
    ) -> Iterator[Event]:
        """Text of the message, with its tokens' log-probabilities and what control did to them."""
        if self._part is None:
            yield from self._open_message()
        assert self._part is not None
        self._part["text"] += text
        self._part["logprobs"] += logprobs
        more = {"control_trace": trace} if trace else {}
        yield {"type": "response.output_text.delta", **self._place, "delta": text, "logprobs": logprobs, **more}

    def end(self, status: ItemStatus) -> Iterator[Event]:
        """Nothing comes any more. An output that holds nothing holds an empty message."""
        if not self.items:
            yield from self._open_message()
        if self._part is not None:
            yield from self._close_message(status)

    def _open_message(self) -> Iterator[Event]:
        # A client may send one request id for many requests, and tells messages apart by their ids.
        item = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant"}
        item |= {"status": "in_progress", "content": []}
        self.items.append(item)
        yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": {**item}}
        self._part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield {"type": "response.content_part.added", **self._place, "part": {**self._part, "logprobs": []}}

    def _close_message(self, status: ItemStatus) -> Iterator[Event]:
        part, item = self._part, self.items[-1]
        assert part is not None
        yield {
            "type": "response.output_text.done",
            **self._place,
            "text": part["text"],
            "logprobs": part["logprobs"],
        }
        yield {"type": "response.content_part.done", **self._place, "part": part}
        item |= {"status": status, "content": [part]}
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}
        self._part = None

    @property
    def _place(self) -> dict[str, Any]:
        """Of the open message's one part."""
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, "content_index": 0}
