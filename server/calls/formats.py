"""The forms of calls that are known, by name, and which of them a chat template is for.

A form says what opens a call in a text, how it is read from there, and which special tokens it needs to see. Where
its calls are JSON, a `Frame` says what stands around names and arguments, so that a grammar can hold a text to calls.
Enter at `FORMATS` and `format_of_template`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from server.calls.calls import Region
from server.calls.gemma_calls import GemmaCall
from server.calls.json_calls import BareJson, MistralJson, TaggedJson
from server.calls.python_calls import PythonBlock, PythonList
from server.calls.writers import Frame, Writer, gemma_writer, python_writer, write_xml
from server.calls.xml_calls import XmlCall

Tools = Mapping[str, Any]
"""The schemas of the tools' parameters by name, each a JSON schema or None."""


@dataclass(slots=True, frozen=True)
class CallFormat:
    name: str
    openers: Mapping[str, Callable[[Tools], Region]]
    """What opens a call, and how what follows is read."""
    starts: Mapping[str, Callable[[Tools], Region]]
    """What opens a call at the beginning of the text alone, and belongs to it, and how that is read."""
    frame: Frame | None
    write: Writer
    """Calls in this form."""
    markers: tuple[str, ...] = ()
    """Tokens that are special in some tokenizers, and which must be seen in the text all the same."""

    @property
    def held_frame(self) -> Frame:
        """That of calls which a grammar holds: where the model's own are not JSON, Hermes'."""
        return self.frame or HERMES_FRAME


HERMES_FRAME = Frame(
    begin='<tool_call>\n{"name": "',
    between='", "arguments": ',
    end="}\n</tool_call>",
    separator="\n",
    trigger="<tool_call>",
)
_OBJECTS = {"{": BareJson}


def _hermes() -> CallFormat:
    openers = {"<tool_call>": lambda tools: TaggedJson(tools, "</tool_call>")}
    return CallFormat("hermes", openers, {}, HERMES_FRAME, HERMES_FRAME.write, ("<tool_call>", "</tool_call>"))


def _qwen_xml() -> CallFormat:
    return CallFormat("qwen-xml", {"<tool_call>": XmlCall}, {}, None, write_xml, ("<tool_call>", "</tool_call>"))


def _llama() -> CallFormat:
    frame = Frame(begin='{"name": "', between='", "parameters": ', end="}", separator="; ")
    return CallFormat("llama", {"<|python_tag|>": BareJson}, _OBJECTS, frame, frame.write, ("<|python_tag|>",))


def _mistral(name: str, frame: Frame) -> CallFormat:
    markers = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
    return CallFormat(name, {"[TOOL_CALLS]": MistralJson}, {}, frame, frame.write, markers)


def _pythonic() -> CallFormat:
    openers = {"<|python_start|>": lambda tools: PythonBlock(tools, "<|python_end|>")}
    markers = ("<|python_start|>", "<|python_end|>")
    return CallFormat("pythonic", openers, {"[": PythonList}, None, python_writer("", "", is_list=True), markers)


def _smollm_python() -> CallFormat:
    openers = {"<code>": lambda tools: PythonBlock(tools, "</code>")}
    return CallFormat("smollm-python", openers, {}, None, python_writer("<code>", "</code>"), ("<code>", "</code>"))


def _gemma() -> CallFormat:
    def block(tools: Tools) -> Region:
        return PythonBlock(tools, "```")

    openers = {"```tool_code": block, "```tool_call": block, "```json": block}
    starts = _OBJECTS | {"[": PythonList}
    return CallFormat("gemma", openers, starts, None, python_writer("```tool_code", "```"))


def _gemma_tokens(name: str, opener: str, closer: str, quote: str) -> CallFormat:
    openers = {opener: lambda tools: GemmaCall(tools, closer, quote)}
    return CallFormat(name, openers, {}, None, gemma_writer(opener, closer, quote), (opener, closer, quote))


FORMATS: dict[str, CallFormat] = {
    form.name: form
    for form in (
        _hermes(),
        _qwen_xml(),
        _llama(),
        _mistral(
            "mistral",
            Frame(
                begin='{"name": "',
                between='", "arguments": ',
                end="}",
                separator=", ",
                first="[TOOL_CALLS][",
                last="]",
                trigger="[TOOL_CALLS]",
            ),
        ),
        _mistral(
            "mistral-args",
            Frame(begin="[TOOL_CALLS]", between="[ARGS]", end="", separator="", trigger="[TOOL_CALLS]"),
        ),
        _pythonic(),
        _smollm_python(),
        _gemma(),
        _gemma_tokens("functiongemma", "<start_function_call>", "<end_function_call>", "<escape>"),
        _gemma_tokens("gemma4", "<|tool_call>", "<tool_call|>", '<|"|>'),
    )
}

_OTHERS = ("<arg_key>", "<parameter name=")
"""Marks of forms that look like one of these and are none."""
# The first whose marks are all in a template is the one that the template is for.
_MARKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("qwen-xml", ("<tool_call>", "<function=")),
    ("hermes", ("<tool_call>",)),
    ("mistral-args", ("[TOOL_CALLS]", "[ARGS]")),
    ("mistral", ("[TOOL_CALLS]",)),
    ("functiongemma", ("<start_function_call>",)),
    ("gemma4", ("<|tool_call>",)),
    ("pythonic", ("<|python_start|>",)),
    ("llama", ('"parameters": ',)),
    ("llama", ("<|python_tag|>",)),
    ("gemma", ("tool_code",)),
)


def format_of_template(template: str, *, takes_tools: bool) -> CallFormat | None:
    """The form of calls that a template is for; None of one that takes tools in a form which is not known.

    A template that takes no tools is told of them in a message, and then in the form that this message names.
    """
    if takes_tools and any(mark in template for mark in _OTHERS):
        return None
    for name, marks in _MARKS:
        if all(mark in template for mark in marks):
            return FORMATS[name]
    if takes_tools:
        return None
    return FORMATS["gemma" if "<start_of_turn>" in template else "hermes"]
