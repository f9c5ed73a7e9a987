"""What single fields of a request body may hold, each with one clear message instead of one for each form it allows.

Every list, map and string has a length that is checked before anything is done with it. Knows nothing of engines.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, FiniteFloat, SkipValidation

from server.types import (
    MAX_LOGIT_BIAS_TOKENS,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    Bias,
)
from server.unicode import check_text

MAX_PROMPTS = 64
MAX_PROMPT_TOKENS = 131_072
MAX_INTEGER = 2**31
"""Beyond any length a model has; keeps thousands of digits out of messages."""
MAX_TIMEOUT_S = 86_400.0

_PROMPT_FORMS = "a string, a list of strings, a list of token ids, or a list of lists of token ids"


def _check_prompt(prompt: Any) -> Any:
    """One clear message instead of one for each form the union allows."""
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError("must not be empty")
        return check_text(prompt)
    if not isinstance(prompt, list):
        raise ValueError(f"must be {_PROMPT_FORMS}")
    if not prompt:
        raise ValueError("must not be empty")
    if isinstance(prompt[0], int):
        return _checked_tokens(prompt)
    if len(prompt) > MAX_PROMPTS:
        raise ValueError(f"at most {MAX_PROMPTS} prompts are allowed, {len(prompt)} were given")
    if all(isinstance(item, str) for item in prompt):
        if not all(prompt):
            raise ValueError("must not hold an empty string")
        return [check_text(item) for item in prompt]
    if all(isinstance(item, list) for item in prompt):
        if not all(prompt):
            raise ValueError("must not hold an empty list")
        return [_checked_tokens(item) for item in prompt]
    raise ValueError(f"must be {_PROMPT_FORMS}")


def _checked_tokens(items: list[Any]) -> list[int]:
    if len(items) > MAX_PROMPT_TOKENS:
        raise ValueError(f"at most {MAX_PROMPT_TOKENS} token ids are allowed")
    # Without booleans, which are integers to Python.
    if not set(map(type, items)) <= {int}:
        raise ValueError(f"must be {_PROMPT_FORMS}")
    return items


def _check_stop(stop: Any) -> Any:
    listed = [stop] if isinstance(stop, str) else stop
    if listed is None:
        return None
    if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
        raise ValueError("must be a string, a list of strings, or null")
    if len(listed) > MAX_STOP_STRINGS:
        raise ValueError(f"at most {MAX_STOP_STRINGS} stop strings are allowed")
    if not all(1 <= len(item) <= MAX_STOP_CHARS for item in listed):
        raise ValueError(f"each stop string must have 1 to {MAX_STOP_CHARS} characters")
    return [check_text(item) for item in listed]


def _check_bias(bias: Any) -> Any:
    """OpenAI's map, whose keys are token ids as strings."""
    if bias is None:
        return None
    if not isinstance(bias, dict):
        raise ValueError("must be a map from token ids, as strings, to numbers")
    if len(bias) > MAX_LOGIT_BIAS_TOKENS:
        raise ValueError(f"at most {MAX_LOGIT_BIAS_TOKENS} tokens are allowed, {len(bias)} were given")
    if not all(_is_token_key(key) for key in bias):
        raise ValueError('each key must be a token id in digits, such as "198"')
    return {int(key): value for key, value in bias.items()}


def _is_token_key(key: str) -> bool:
    return key.isascii() and key.isdecimal() and len(key) <= len(str(MAX_INTEGER)) and key == str(int(key))


# Everything has been checked by then; pydantic would try each form on every token.
Prompt = Annotated[str | list[str] | list[int] | list[list[int]], SkipValidation, BeforeValidator(_check_prompt)]
Stop = Annotated[list[str] | None, BeforeValidator(_check_stop, json_schema_input_type=str | list[str] | None)]
LogitBias = Annotated[
    dict[int, Bias] | None, BeforeValidator(_check_bias, json_schema_input_type=dict[str, Bias] | None)
]
TokenId = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
StopTokenIds = Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS)]
Seconds = Annotated[FiniteFloat, Field(gt=0, le=MAX_TIMEOUT_S)]
