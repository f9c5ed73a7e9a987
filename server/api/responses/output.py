"""The items of a response's output, and the events that tell how they grow. Enter at `Output`."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any, Literal

from server.calls.calls import CallDelta

Event = dict[str, Any]
ItemStatus = Literal["completed", "incomplete"]


class Output:
    """Messages and calls in the order in which they come. The last of them is open until another begins, or the end."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._is_open = False
        """Whether the last item goes on."""

    @property
    def is_text(self) -> bool:
        """Whether what comes belongs to a message as far as one knows."""
        return not self.items or self.items[-1]["type"] == "message"

    def add_text(self, text: str, logprobs: list[dict[str, Any]], trace: list[dict[str, Any]]) -> Iterator[Event]:
        """Text of a message, with its tokens' log-probabilities and what control did to them."""
        if not self._is_open or self.items[-1]["type"] != "message":
            yield from self._end_item("completed")
            yield from self._begin_message()
        part = self.items[-1]["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs
        yield self._at_part("output_text.delta", delta=text, logprobs=logprobs, **_traced(trace))

    def add_call(self, delta: CallDelta, trace: list[dict[str, Any]]) -> Iterator[Event]:
        """A piece of a call: the name, which begins it, or more of its arguments."""
        if delta.name is not None:
            yield from self._end_item("completed")
            item = {"type": "function_call", "call_id": f"call_{secrets.token_hex(12)}", "name": delta.name}
            yield self._begin("fc", {**item, "arguments": ""})
        if delta.arguments:
            self.items[-1]["arguments"] += delta.arguments
            yield self._at_item("function_call_arguments.delta", delta=delta.arguments, **_traced(trace))

    def end(self, status: ItemStatus) -> Iterator[Event]:
        """Nothing comes any more. An output that holds nothing holds an empty message."""
        if not self.items:
            yield from self._begin_message()
        yield from self._end_item(status)

    def _begin_message(self) -> Iterator[Event]:
        yield self._begin("msg", {"type": "message", "role": "assistant", "content": []})
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self.items[-1]["content"].append(part)
        yield self._at_part("content_part.added", part={**part, "logprobs": []})

    def _begin(self, prefix: str, item: dict[str, Any]) -> Event:
        # A client may send one request id for many requests, and tells items apart by their ids.
        item = {"id": f"{prefix}_{secrets.token_hex(12)}", "status": "in_progress", **item}
        self.items.append(item)
        self._is_open = True
        shown = {**item, "content": []} if "content" in item else {**item}
        return {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": shown}

    def _end_item(self, status: ItemStatus) -> Iterator[Event]:
        if not self._is_open:
            return
        self._is_open = False
        item = self.items[-1]
        if item["type"] == "message":
            (part,) = item["content"]
            yield self._at_part("output_text.done", text=part["text"], logprobs=part["logprobs"])
            yield self._at_part("content_part.done", part=part)
        else:
            yield self._at_item("function_call_arguments.done", name=item["name"], arguments=item["arguments"])
        item["status"] = status
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}

    def _at_item(self, event: str, /, **fields: Any) -> Event:
        place = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return {"type": f"response.{event}", **place, **fields}

    def _at_part(self, event: str, /, **fields: Any) -> Event:
        """Of a message's one part."""
        return self._at_item(event, content_index=0, **fields)


def _traced(trace: list[dict[str, Any]]) -> dict[str, Any]:
    return {"control_trace": trace} if trace else {}
