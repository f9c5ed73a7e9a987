"""A conversation as token ids, in the model's own chat template.

transformers renders it in a sandbox. Where the template has no place for tools they are told in a message
(`tool_prompt.py`). What a request tells the template beside messages is held against what the template reads, so that
nothing is told in vain. Whatever messages and tools spell, only the template makes control tokens (`content.py`). Enter
at `encode_chat` and `begun_turn`.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jinja2

from server.calls.formats import FORMATS, CallFormat, format_of_template
from server.engines.content import ControlTokens, control_tokens
from server.engines.tool_prompt import with_tool_prompt
from server.errors import InvalidRequestError
from server.types import ChatRendering

_THINKS = "think"
"""Templates of models that reason have it in them, as a tag or as a variable."""
_SWITCH = "enable_thinking"
_EFFORT = "reasoning_effort"
_NO_EFFORT = "none"
_MISTRAL_ID = re.compile("[a-zA-Z0-9]{9}", re.ASCII)
_PROBE: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "A probe.",
        "parameters": {
            "type": "object",
            "properties": {"text": {"type": "string", "description": "A text."}},
            "required": ["text"],
        },
    },
}
Message = Mapping[str, Any]


def encode_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    rendering: ChatRendering | None = None,
    call_format: CallFormat | None = None,
) -> list[int]:
    """Token ids of the messages. Raises InvalidRequestError, in the template's words where it refuses them.

    `call_format` is how the model writes calls of tools, and needed where there are any.
    """
    rendering = rendering or ChatRendering()
    # The plain text comes first, so that a template's refusal never tells of marks.
    text = _text(tokenizer, messages, rendering, call_format)
    control = control_tokens(tokenizer, _template(tokenizer, rendering))
    mark = secrets.token_hex(16)
    told = _Told([dict(message) for message in messages], rendering, call_format)
    shown = None
    if control.may_be_made:
        shown = _shown_everywhere(tokenizer, told, control, mark, text)
    if shown is None:
        try:
            shown = _shown(tokenizer, told, control, mark, text)
        except InvalidRequestError as error:
            raise InvalidRequestError(error.message.replace(mark, ""), param=error.param) from error
        if control.may_be_made:
            _check_that_none_is_made(tokenizer, told, control, text if shown is None else shown)
    if shown is None:
        return control.encode(text, add_special_tokens=rendering.add_special_tokens)
    return control.encode(shown, mark, add_special_tokens=rendering.add_special_tokens)


@dataclass(slots=True, frozen=True)
class _Told:
    """All that the template is told."""

    messages: list[dict[str, Any]]
    rendering: ChatRendering
    call_format: CallFormat | None

    def changed(self, change: Callable[[Any], Any]) -> _Told:
        """With all that callers wrote changed."""
        rendering = replace(
            self.rendering, tools=tuple(change(self.rendering.tools)), variables=change(self.rendering.variables)
        )
        # Templates compare a message's role, and no caller can choose it freely; what else is called so is content.
        messages = [{**change(message), "role": message["role"]} for message in self.messages]
        return replace(self, messages=messages, rendering=rendering)

    def marked(self, control: ControlTokens, mark: str, *, everywhere: bool = False) -> _Told:
        return self.changed(lambda value: control.marked(value, mark, everywhere=everywhere))

    def text(self, tokenizer: Any) -> str:
        return _text(tokenizer, self.messages, self.rendering, self.call_format)


def begun_turn(
    tokenizer: Any,
    messages: Sequence[Message],
    rendering: ChatRendering | None = None,
    call_format: CallFormat | None = None,
) -> tuple[str, bool]:
    """What the rendered messages hold of the turn that the response goes on with, and whether some of it is said.

    It begins where the rendering begins to differ from that of the messages before the turn, so that no other message
    is in it, whatever that holds. Raises InvalidRequestError.
    """
    rendering = rendering or ChatRendering()
    continues = rendering.continue_final_message
    if not continues and not rendering.add_generation_prompt:
        return "", False
    whole = _text(tokenizer, messages, rendering, call_format)
    before, said = (messages[:-1], messages[-1]["content"]) if continues else (messages, "")
    closed = replace(rendering, add_generation_prompt=False, continue_final_message=False)
    try:
        without = _text(tokenizer, before, closed, call_format) if before else ""
    except InvalidRequestError:
        # A template may take no conversation that ends there; the message itself is known all the same.
        return said, bool(said.strip())
    num_shared = next((i for i, (a, b) in enumerate(zip(whole, without, strict=False)) if a != b), len(without))
    return whole[num_shared:], bool(said.strip())


def default_system(
    tokenizer: Any,
    messages: Sequence[Message],
    rendering: ChatRendering | None = None,
    call_format: CallFormat | None = None,
) -> str:
    """What the template says in the place of a system message where these messages have none; mostly nothing."""
    rendering, mark = rendering or ChatRendering(), secrets.token_hex(16)
    try:
        bare = _text(tokenizer, messages, rendering, call_format)
        told = _text(tokenizer, [{"role": "system", "content": mark}, *messages], rendering, call_format)
    except InvalidRequestError:
        return ""
    before, _, behind = told.partition(mark)
    is_around = mark in told and bare.startswith(before) and bare.endswith(behind)
    return bare[len(before) : len(bare) - len(behind)] if is_around and len(bare) > len(before + behind) else ""


def _text(tokenizer: Any, messages: Sequence[Message], rendering: ChatRendering, call_format: CallFormat | None) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidRequestError("messages: this model has no chat template; use /v1/completions", param="messages")
    has_tools = bool(rendering.tools) or any(m["role"] == "tool" or "tool_calls" in m for m in messages)
    try:
        if not has_tools:
            return _rendered(tokenizer, messages, rendering)
        if takes_tools(tokenizer):
            return _rendered(tokenizer, list(_with_known_ids(messages, call_format)), rendering)
        return _rendered_by_prompt(tokenizer, messages, rendering, call_format or FORMATS["hermes"])
    except InvalidRequestError:
        raise
    except Exception as error:
        raise InvalidRequestError(
            f"messages: the model's chat template refuses them ({error})", param="messages"
        ) from error


def _shown_everywhere(tokenizer: Any, told: _Told, control: ControlTokens, mark: str, text: str) -> str | None:
    """The conversation with marks wherever a control token could begin, where the template shows `text` with them.

    A template that takes a word out of a content, such as `/no_think`, puts together what stood around it; and what is
    then a control token was none before.
    """
    try:
        shown = _shown(tokenizer, told, control, mark, text, everywhere=True)
    except InvalidRequestError:
        return None
    return shown if shown is not None and shown.replace(mark, "") == text else None


def _check_that_none_is_made(tokenizer: Any, told: _Told, control: ControlTokens, shown: str) -> None:
    """Where marks everywhere would change what the template does: that it shows the control tokens that it shows of
    contents without any character that one begins with, so that all of them are its own. Raises InvalidRequestError."""
    try:
        own = control.names_in(told.changed(control.disarmed).text(tokenizer))
    except InvalidRequestError:
        own = None
    if control.names_in(shown) != own:
        raise InvalidRequestError(
            "messages: this model's chat template may make a control token of what they spell, which is in none of "
            "them; write it otherwise",
            param="messages",
        )


def _shown(
    tokenizer: Any, told: _Told, control: ControlTokens, mark: str, text: str, *, everywhere: bool = False
) -> str | None:
    """The conversation with marks in it; None where there is nothing to mark."""
    marked = told.marked(control, mark, everywhere=everywhere)
    if marked == told:
        return None
    return _shown_apart(tokenizer, told, control, mark, text, everywhere=everywhere) or marked.text(tokenizer)


def _shown_apart(
    tokenizer: Any, told: _Told, control: ControlTokens, mark: str, text: str, *, everywhere: bool = False
) -> str | None:
    """The conversation with marks in it and its reasoning told apart, where the template then shows `text`, marked.

    Templates of models that reason look for the end of reasoning in an answer, to leave out or to show apart what is
    before it. A marked one does not look like that, so the parts are told apart for the template where that is what it
    makes of them.
    """
    parts = [_with_reasoning_apart(message, control.names) for message in told.messages]
    if parts == told.messages:
        return None
    apart = replace(told, messages=parts).marked(control, mark, everywhere=everywhere).text(tokenizer)
    return apart if apart.replace(mark, "") == text else None


def _with_reasoning_apart(message: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """An assistant's message whose text holds the end of reasoning, as templates take it apart."""
    content = message.get("content")
    if message["role"] != "assistant" or not isinstance(content, str):
        return message
    ends = [name for name in names if _THINKS in name.lower() and name[1:2] == "/"]
    end = next((name for name in ends if name in content), None)
    if end is None:
        return message
    before, _, answer = content.rpartition(end)
    reasoning = before.split(end)[0].rpartition(end.replace("/", "", 1))[2]
    return {**message, "content": answer.lstrip("\n"), "reasoning_content": reasoning.strip("\n")}


def template_of(tokenizer: Any) -> str | None:
    """The template of a chat; of several, the one that is named default."""
    template = getattr(tokenizer, "chat_template", None) or None
    return template.get("default") if isinstance(template, dict) else template


def takes_tools(tokenizer: Any) -> bool:
    """Whether tools change what the chat template renders."""
    if not getattr(tokenizer, "chat_template", None):
        return False
    messages = [{"role": "user", "content": "?"}]
    try:
        plain = tokenizer.apply_chat_template(messages, tokenize=False)
        return plain != tokenizer.apply_chat_template(messages, tools=[_PROBE], tokenize=False)
    except jinja2.TemplateSyntaxError:
        return False
    except Exception:
        # It refuses a single message, so what it reads has to say it.
        return "tools" in _names_read(tokenizer.get_chat_template(tools=[_PROBE]))


def call_format_of(tokenizer: Any, wanted: str = "auto") -> CallFormat | None:
    """The form of calls of this name, or that of the chat template; None where that is not known."""
    if wanted != "auto":
        return FORMATS[wanted]
    if not getattr(tokenizer, "chat_template", None):
        return None
    return format_of_template(tokenizer.get_chat_template(tools=[_PROBE]), takes_tools=takes_tools(tokenizer))


def _template(tokenizer: Any, rendering: ChatRendering) -> str:
    return tokenizer.get_chat_template(tools=_tools(rendering))


def _tools(rendering: ChatRendering) -> list[dict[str, Any]] | None:
    return [dict(tool) for tool in rendering.tools] or None


def _rendered(tokenizer: Any, messages: Sequence[Message], rendering: ChatRendering) -> str:
    template = _template(tokenizer, rendering)
    return tokenizer.apply_chat_template(
        list(_with_roles(messages, template)),
        tools=_tools(rendering),
        add_generation_prompt=rendering.add_generation_prompt,
        continue_final_message=rendering.continue_final_message,
        tokenize=False,
        **_variables(template, rendering),
    )


def _rendered_by_prompt(
    tokenizer: Any, messages: Sequence[Message], rendering: ChatRendering, call_format: CallFormat
) -> str:
    """By a template without a place for tools."""
    messages, plain = list(_with_roles(messages, "")), replace(rendering, tools=())
    try:
        in_system = with_tool_prompt(messages, rendering.tools, call_format, has_system=True)
        return _rendered(tokenizer, in_system, plain)
    except jinja2.TemplateError:
        in_user = with_tool_prompt(messages, rendering.tools, call_format, has_system=False)
        return _rendered(tokenizer, in_user, plain)


def _with_known_ids(messages: Sequence[Message], call_format: CallFormat | None) -> Iterator[Message]:
    """Mistral's templates refuse ids of calls that have not nine letters or digits, which other servers give."""
    if call_format is None or not call_format.name.startswith("mistral"):
        yield from messages
        return
    for message in messages:
        known = dict(message)
        if "tool_calls" in message:
            known["tool_calls"] = [{**call, "id": _mistral_id(call["id"])} for call in message["tool_calls"]]
        if "tool_call_id" in message:
            known["tool_call_id"] = _mistral_id(message["tool_call_id"])
        yield known


def _mistral_id(call_id: str) -> str:
    if _MISTRAL_ID.fullmatch(call_id):
        return call_id
    return hashlib.blake2b(call_id.encode(), digest_size=8).hexdigest()[:9]


def _with_roles(messages: Sequence[Message], template: str) -> Iterator[dict[str, Any]]:
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
