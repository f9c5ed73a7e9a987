"""Fields of OpenAI's and vLLM's bodies that are not served, with the reason that a request is told.

null asks for nothing, and some fields have further values that ask for what is done anyway, which many clients send;
those are taken. Whatever else would change something is refused and never ignored. Enter at `WithUnserved`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, model_validator

from server.api.floods import refuse_flood
from server.field_errors import REFUSED, field_error


@dataclass(slots=True, frozen=True)
class Unserved:
    """Why a field is not served, and the values of it, beside null, that ask for what is done anyway."""

    reason: str
    harmless: tuple[Any, ...] = ()

    def refuses(self, value: Any) -> bool:
        # To Python true is 1, but to a client it is not.
        return value is not None and not any(
            value == other and isinstance(value, bool) == isinstance(other, bool) for other in self.harmless
        )


def without_unserved(body: Any, fields: Mapping[str, Unserved]) -> Any:
    """The body without those of the fields that ask for nothing.

    Raises PydanticCustomError of type REFUSED, which names the field, for one that asks for something.
    """
    if not isinstance(body, dict):
        return body
    for name, field in fields.items():
        if field.refuses(body.get(name)):
            raise field_error(name, field.reason, REFUSED)
    return {name: value for name, value in body.items() if name not in fields}


class WithUnserved(BaseModel):
    """A body, or a part of one, that refuses what is not served of it, and more than it could hold."""

    unserved: ClassVar[Mapping[str, Unserved]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_unserved(cls, body: Any) -> Any:
        body = without_unserved(body, cls.unserved)
        refuse_flood(cls, body)
        return body


_OLDER_FORM = "OpenAI's older form is not served; use the newer"
_NO_AUDIO = "audio is not supported"
_NO_REGEX = "regular expressions from requests are not run; use json or choice"
_NO_GRAMMAR = "grammars from requests are not run; use json or choice"

GENERATION: dict[str, Unserved] = {
    "store": Unserved("no response is stored", (False,)),
    "service_tier": Unserved("there is one tier; only auto and default are allowed", ("auto", "default")),
    "use_beam_search": Unserved("beam search is not supported", (False,)),
    "num_beams": Unserved("beam search is not supported", (1,)),
    "length_penalty": Unserved("only beam search has one, which is not supported", (1,)),
    "min_tokens": Unserved("not supported; ignore_eos goes on to max_tokens", (0,)),
    "bad_words": Unserved("not supported; logit_bias of -100 keeps tokens out", ([],)),
    "allowed_token_ids": Unserved("not supported; logit_bias or response_format say what may come"),
    "include_stop_str_in_output": Unserved("what ends a text is left out of it", (False,)),
    "skip_special_tokens": Unserved("special tokens are always left out of the text", (True,)),
    # Between tokens that are left out there are no spaces.
    "spaces_between_special_tokens": Unserved("special tokens are always left out of the text", (True, False)),
    "truncate_prompt_tokens": Unserved("a prompt is never cut; send what fits the context"),
    "prompt_logprobs": Unserved("not supported by this name; completions have echo with logprobs"),
    "return_tokens_as_token_ids": Unserved("not supported", (False,)),
    "return_token_ids": Unserved("not supported; /tokenize gives those of a text", (False,)),
    "guided_regex": Unserved(_NO_REGEX),
    "guided_grammar": Unserved(_NO_GRAMMAR),
    "priority": Unserved("requests are served in the order in which they come", (0,)),
}
"""Of completions and chats."""

COMPLETION: dict[str, Unserved] = GENERATION | {
    "suffix": Unserved("not supported; the served models continue text and do not fill in", ("",)),
    "messages": Unserved("chats have them, at /v1/chat/completions; a completion has a prompt"),
}

CHAT: dict[str, Unserved] = GENERATION | {
    "functions": Unserved(f"{_OLDER_FORM}, tools", ([],)),
    "function_call": Unserved(f"{_OLDER_FORM}, tool_choice", ("none", "auto")),
    "modalities": Unserved("only text is served", (["text"],)),
    "audio": Unserved(_NO_AUDIO),
    "prediction": Unserved("predicted outputs are not supported"),
    "verbosity": Unserved("not supported but for medium; say in a message how long the answer is to be", ("medium",)),
    "web_search_options": Unserved("the server searches no web"),
    "moderation": Unserved("there is no moderation; control.stop_below is a guardrail"),
    "prompt_cache_retention": Unserved("cached prompts are kept in memory alone", ("in_memory",)),
    "prompt_cache_options": Unserved("not supported; beginnings of prompts are always cached in memory"),
    "documents": Unserved("not supported; put them into a message", ([],)),
    "prompt": Unserved("completions have it, at /v1/completions; a chat has messages"),
    "best_of": Unserved("completions alone have it; in a chat, control.search keeps the best", (1,)),
    "echo": Unserved("completions alone have it", (False,)),
    "chat_template": Unserved("a template from a request is never rendered; the model's own is used"),
}

_NO_ITEMS = "no response is stored; give its output back as items of input"
_NO_BACKGROUND = "a response ends with its connection; stream it"

RESPONSE: dict[str, Unserved] = GENERATION | {
    "previous_response_id": Unserved(_NO_ITEMS),
    "previous_response": Unserved(_NO_ITEMS),
    "previous_input_messages": Unserved("not supported; give earlier messages as items of input", ([],)),
    "conversation": Unserved(_NO_ITEMS),
    "background": Unserved(_NO_BACKGROUND, (False,)),
    "background_options": Unserved(_NO_BACKGROUND, ({},)),
    "prompt": Unserved("no prompts are stored; give instructions and input"),
    "truncation": Unserved("a prompt is never cut; send what fits the context", ("disabled",)),
    "context_management": Unserved("a prompt is never cut or compacted; send what fits the context", ([],)),
    "moderation": Unserved("there is no moderation; control.stop_below is a guardrail"),
    "prompt_cache_retention": Unserved("cached prompts are kept in memory alone", ("in_memory",)),
    "prompt_cache_options": Unserved("not supported; beginnings of prompts are always cached in memory"),
    "access_programs": Unserved("they are OpenAI's own"),
    "image": Unserved("only text is served"),
    "enable_response_messages": Unserved("not supported; /tokenize tells how messages are rendered", (False,)),
    "messages": Unserved("chats have them, at /v1/chat/completions; a response has input"),
    "n": Unserved("a response is one; ask several times", (1,)),
    "max_tokens": Unserved("its name here is max_output_tokens"),
    "max_completion_tokens": Unserved("its name here is max_output_tokens"),
    "response_format": Unserved("its name here is text.format", ({"type": "text"},)),
    "reasoning_effort": Unserved("its name here is reasoning.effort"),
    "verbosity": Unserved("its name here is text.verbosity"),
    "logprobs": Unserved('include: ["message.output_text.logprobs"] asks for them here', (False,)),
}
"""Of /v1/responses."""

REASONING: dict[str, Unserved] = {
    # Whether there is a summary is then left to the server.
    "summary": Unserved("reasoning is not summarised", ("auto",)),
    "generate_summary": Unserved("reasoning is not summarised", ("auto",)),
    "mode": Unserved("there is one way to reason", ("standard",)),
    "context": Unserved("the chat template says which past reasoning the model is shown", ("auto",)),
}
TEXT: dict[str, Unserved] = {"verbosity": CHAT["verbosity"]}
RESPONSE_STREAM_OPTIONS: dict[str, Unserved] = {
    "include_obfuscation": Unserved("events are not padded", (False,)),
    "include_usage": Unserved("the last event always has it", (True,)),
}
ITEM: dict[str, Unserved] = {
    "tool_calls": Unserved("calls are items of type function_call here", ([],)),
    "tool_call_id": Unserved("what a function gave is an item of type function_call_output here"),
}
"""Of an input item that is a message."""
FUNCTION_TOOL: dict[str, Unserved] = {
    "defer_loading": Unserved("there is no search for tools", (False,)),
    "allowed_callers": Unserved("functions are called by the model alone", (["direct"],)),
    "async": Unserved("a function is called and then answered for", (False,)),
    "output_schema": Unserved("not supported; say it in the description"),
}
ITEMS: dict[str, str] = {
    "item_reference": "no response is stored; give the item itself (with the AI SDK: store: false)",
    "compaction": "prompts are not compacted; give the items themselves",
    "compaction_trigger": "prompts are not compacted; send what fits the context",
    "configuration_update": "give what it changes as fields of the request",
}
"""Types of input items that are not served, with the reason; for further ones that clients send it is `NO_ITEM`."""
NO_ITEM = "items of this type are not supported; {served} are"

MESSAGE: dict[str, Unserved] = {
    "function_call": Unserved(f"{_OLDER_FORM}, tool_calls"),
    "audio": Unserved(_NO_AUDIO),
    # lm-eval's, and that of the Responses API.
    "type": Unserved("a message has no other type than message or text", ("message", "text")),
    # LiteLLM's, in answers that came through it.
    "images": Unserved("only text is served", ([],)),
    "thinking_blocks": Unserved("past reasoning goes into reasoning_content", ([],)),
    "provider_specific_fields": Unserved("they say nothing here", ({}, {"refusal": None})),
}
STREAM_OPTIONS: dict[str, Unserved] = {"include_obfuscation": Unserved("events are not padded", (False,))}
ROLE = Unserved(f"{_OLDER_FORM}, tool", ("system", "developer", "user", "assistant", "tool"))
"""Of a message, for the role that answered a function's call."""

STRUCTURE: dict[str, Unserved] = {
    "regex": Unserved(_NO_REGEX),
    "grammar": Unserved(_NO_GRAMMAR),
    "structural_tag": Unserved(_NO_GRAMMAR),
}
"""Of vLLM's `structured_outputs`."""
