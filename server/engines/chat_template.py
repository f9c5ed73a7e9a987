"""A conversation as token ids, in the model's own chat template.

transformers renders it in a sandbox. What a request tells the template beside messages is held against what the
template reads, so that nothing is told in vain. Enter at `encode_chat`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2

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
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidRequestError("messages: this model has no chat template; use /v1/completions", param="messages")
    try:
        template = tokenizer.get_chat_template()
        variables = _variables(template, rendering)
        text = tokenizer.apply_chat_template(
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
    return list(tokenizer(text, add_special_tokens=rendering.add_special_tokens)["input_ids"])


def template_of(tokenizer: Any) -> str | None:
    """The template of a chat; of several, the one that is named default."""
    template = getattr(tokenizer, "chat_template", None) or None
    return template.get("default") if isinstance(template, dict) else template


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
