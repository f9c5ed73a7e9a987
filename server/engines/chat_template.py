"""A conversation as token ids, in the model's own chat template.

transformers renders it in a sandbox. What a request tells the template beside messages is held against what the
template reads, so that nothing is told in vain. Whatever messages spell, only the template makes control tokens
(content.py). Enter at `encode_chat`.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jinja2

from server.engines.content import control_tokens
from server.errors import InvalidRequestError
from server.types import ChatRendering

_THINKS = "think"
"""Templates of models that reason have it in them, as a tag or as a variable."""
_SWITCH = "enable_thinking"
_EFFORT = "reasoning_effort"
_NO_EFFORT = "none"


def encode_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], rendering: ChatRendering | None = None
) -> list[int]:
    """Token ids of the messages. Raises InvalidRequestError, in the template's words where it refuses them."""
    rendering = rendering or ChatRendering()
    # The plain text comes first, so that a template's refusal never tells of marks.
    text = _rendered(tokenizer, messages, rendering)
    control = control_tokens(tokenizer, tokenizer.get_chat_template())
    mark = secrets.token_hex(16)
    told = {"messages": list(messages), "variables": dict(rendering.variables)}
    if control.marked(told, mark) == told:
        return control.encode(text, add_special_tokens=rendering.add_special_tokens)
    try:
        shown = _shown(tokenizer, told, rendering, mark, text)
    except InvalidRequestError as error:
        raise InvalidRequestError(error.message.replace(mark, ""), param=error.param) from error
    return control.encode(shown, mark, add_special_tokens=rendering.add_special_tokens)


def _rendered(tokenizer: Any, messages: Sequence[Mapping[str, str]], rendering: ChatRendering) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidRequestError("messages: this model has no chat template; use /v1/completions", param="messages")
    try:
        template = tokenizer.get_chat_template()
        variables = _variables(template, rendering)
        return tokenizer.apply_chat_template(
            list(_with_roles(messages, template)),
            add_generation_prompt=rendering.add_generation_prompt,
            continue_final_message=rendering.continue_final_message,
            tokenize=False,
            **variables,
        )
    except InvalidRequestError:
        raise
    except Exception as error:
        raise InvalidRequestError(
            f"messages: the model's chat template refuses them ({error})", param="messages"
        ) from error


def _shown(tokenizer: Any, told: dict[str, Any], rendering: ChatRendering, mark: str, text: str) -> str:
    """The conversation as the template shows it with marks in it; `text` is the same without.

    Templates of models that reason look for the end of reasoning in an answer, to leave out or to show apart what is
    before it. A marked one does not look like that, so the parts are told apart for the template where that is what it
    makes of them.
    """
    control = control_tokens(tokenizer, tokenizer.get_chat_template())

    def show(messages: list[dict[str, Any]]) -> str:
        marked = control.marked({**told, "messages": messages}, mark)
        return _rendered(tokenizer, marked["messages"], replace(rendering, variables=marked["variables"]))

    parts = [_with_reasoning_apart(message, control.names) for message in told["messages"]]
    if parts != told["messages"] and (apart := show(parts)).replace(mark, "") == text:
        return apart
    return show(told["messages"])


def _with_reasoning_apart(message: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """An assistant's message whose text holds the end of reasoning, as templates take it apart."""
    content = message.get("content")
    if message["role"] != "assistant" or not isinstance(content, str):
        return dict(message)
    ends = [name for name in names if _THINKS in name.lower() and name[1:2] == "/"]
    end = next((name for name in ends if name in content), None)
    if end is None:
        return dict(message)
    before, _, answer = content.rpartition(end)
    reasoning = before.split(end)[0].rpartition(end.replace("/", "", 1))[2]
    return {**message, "content": answer.lstrip("\n"), "reasoning_content": reasoning.strip("\n")}


def _with_roles(messages: Sequence[Mapping[str, str]], template: str) -> Iterator[dict[str, str]]:
    """A developer's message is a system message, unless the template knows developers."""
    knows_developers = any(f"{quote}developer{quote}" in template for quote in "'\"")
    for message in messages:
        is_renamed = message["role"] == "developer" and not knows_developers
        yield {**message, "role": "system"} if is_renamed else dict(message)


def _variables(template: str, rendering: ChatRendering) -> dict[str, bool | int | str]:
    """What the template is told beside messages. Raises InvalidRequestError for what it does not read."""
    effort, variables = rendering.reasoning_effort, dict(rendering.variables)
    if effort is None and not variables:
        return {}
    read = _names_read(template)
    for name, value in rendering.variables.items():
        # Where nothing thinks, thinking is off anyway.
        if name not in read and (value is not False or _THINKS in template):
            param = f"chat_template_kwargs.{name}"
            raise InvalidRequestError(f"{param}: this model's chat template does not read it", param=param)
    if effort is not None:
        # As in vLLM: a template that knows only on and off takes any effort but none for on.
        told = {_EFFORT: effort, _SWITCH: effort != _NO_EFFORT}
        told = {name: value for name, value in told.items() if name in read}
        if not told and (effort != _NO_EFFORT or _THINKS in template):
            raise InvalidRequestError(f"{_EFFORT}: this model's chat template has no setting for it", param=_EFFORT)
        variables = told | variables
    return variables


def _names_read(template: str) -> set[str]:
    """The names in the template's code that are no attributes of another."""
    names: set[str] = set()
    before = ""
    for _, kind, token in jinja2.Environment(autoescape=True).lex(template):
        if kind == "name" and before != ".":
            names.add(token)
        before = token
    return names
