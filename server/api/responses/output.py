"""The items of a response's output, and the events that tell how they grow. Enter at `Output`."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any, Literal

from server.calls.calls import CallDelta

Event = dict[str, Any]
ItemStatus = Literal["completed", "incomplete"]


class Output:
    """What the model thinks, says and calls, in the order in which it comes.

    The last item is open until another begins, or the end. `trace` is what control did to the tokens that come. Events
    hold the items themselves, which go on growing, so they must be written before the next one is asked for.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._is_open = False
        """Whether the last item goes on."""

    @property
    def is_text(self) -> bool:
        """Whether what comes belongs to a message as far as one knows."""
        return not self.items or self.items[-1]["type"] == "message"

    def add_reasoning(self, text: str, trace: list[dict[str, Any]]) -> Iterator[Event]:
        if not self._is_in("reasoning"):
            yield from self._begin_reasoning()
        self._part["text"] += text
        yield self._at_part("reasoning_text.delta", delta=text, **_traced(trace))

    def add_text(self, text: str, logprobs: list[dict[str, Any]], trace: list[dict[str, Any]]) -> Iterator[Event]:
        """Text of a message, with its tokens' log-probabilities."""
        if not self._is_in("message"):
            yield from self._begin_message()
        self._part["text"] += text
        self._part["logprobs"] += logprobs
        yield self._at_part("output_text.delta", delta=text, logprobs=logprobs, **_traced(trace))

    def add_call(self, delta: CallDelta, trace: list[dict[str, Any]]) -> Iterator[Event]:
        """A piece of a call: the name, which begins it, or more of its arguments."""
        if delta.name is not None:
            call = {"call_id": f"call_{secrets.token_hex(12)}", "name": delta.name, "arguments": ""}
            yield from self._begin("function_call", "fc", call)
        if delta.arguments:
            self.items[-1]["arguments"] += delta.arguments
            yield self._at_item("function_call_arguments.delta", delta=delta.arguments, **_traced(trace))

    def end(self, status: ItemStatus) -> Iterator[Event]:
        """Nothing comes any more. An output that holds nothing holds an empty message."""
        if not self.items:
            yield from self._begin_message()
        yield from self._end_item(status)

    def forget_logprobs(self) -> None:
        """For an output that has been told once."""
        for part in (part for item in self.items for part in item.get("content", ()) if "logprobs" in part):
            part["logprobs"] = []

    def _is_in(self, kind: str) -> bool:
        return self._is_open and self.items[-1]["type"] == kind

    @property
    def _part(self) -> dict[str, Any]:
        """The open item's one part."""
        return self.items[-1]["content"][0]

    def _begin_reasoning(self) -> Iterator[Event]:
        yield from self._begin("reasoning", "rs", {"summary": [], "content": [], "encrypted_content": None})
        yield self._begin_part({"type": "reasoning_text", "text": ""})

    def _begin_message(self) -> Iterator[Event]:
        yield from self._begin("message", "msg", {"role": "assistant", "content": []})
        yield self._begin_part({"type": "output_text", "text": "", "annotations": [], "logprobs": []})

    def _begin(self, kind: str, prefix: str, fields: dict[str, Any]) -> Iterator[Event]:
        yield from self._end_item("completed")
        # A client may send one request id for many requests, and tells items apart by their ids.
        item = {"id": f"{prefix}_{secrets.token_hex(12)}", "type": kind, "status": "in_progress", **fields}
        self.items.append(item)
        self._is_open = True
        yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": item}

    def _begin_part(self, part: dict[str, Any]) -> Event:
        self.items[-1]["content"].append(part)
        return self._at_part("content_part.added", part=part)

    def _end_item(self, status: ItemStatus) -> Iterator[Event]:
        if not self._is_open:
            return
        self._is_open = False
        item = self.items[-1]
        if item["type"] == "function_call":
            yield self._at_item("function_call_arguments.done", name=item["name"], arguments=item["arguments"])
        else:
            part = self._part
            scores = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
            yield self._at_part(f"{part['type']}.done", text=part["text"], **scores)
            yield self._at_part("content_part.done", part=part)
        item["status"] = status
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}

    def _at_item(self, event: str, /, **fields: Any) -> Event:
        place = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return {"type": f"response.{event}", **place, **fields}

    def _at_part(self, event: str, /, **fields: Any) -> Event:
        return self._at_item(event, content_index=0, **fields)


def _traced(trace: list[dict[str, Any]]) -> dict[str, Any]:
    return {"control_trace": trace} if trace else {}
