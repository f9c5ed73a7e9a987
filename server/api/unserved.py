"""Fields of OpenAI's and vLLM's bodies that are not served, with the reason that a request is told.

null asks for nothing, and some fields have further values that ask for what is done anyway, which many clients send;
those are taken. Whatever else would change something is refused and never ignored. Enter at `WithUnserved`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, model_validator
from pydantic_core import PydanticCustomError

REFUSED = "unsupported_field"


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
            raise PydanticCustomError(REFUSED, "{name}: {reason}", {"name": name, "reason": field.reason})
    return {name: value for name, value in body.items() if name not in fields}


class WithUnserved(BaseModel):
    """A body, or a part of one, that refuses what is not served of it."""

    unserved: ClassVar[Mapping[str, Unserved]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_unserved(cls, body: Any) -> Any:
        return without_unserved(body, cls.unserved)


_OLDER_FORM = "OpenAI's older form is not served; use the newer"
_NO_AUDIO = "audio is not supported"
_NO_REGEX = "regular expressions from requests are not run; use json or choice"
_NO_GRAMMAR = "grammars from requests are not run; use json or choice"

GENERATION: dict[str, Unserved] = {
    "store": Unserved("no response is stored", (False,)),
    "service_tier": Unserved("there is one tier; only auto and default are allowed", ("auto", "default")),
    "use_beam_search": Unserved("beam search is not supported", (False,)),
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

MESSAGE: dict[str, Unserved] = {
    "function_call": Unserved(f"{_OLDER_FORM}, tool_calls"),
    "audio": Unserved(_NO_AUDIO),
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
