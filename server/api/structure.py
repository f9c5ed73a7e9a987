"""`response_format`: plain text, any JSON object, or JSON that holds a schema; what a schema may look like.

A schema of strangers is bounded here in size, depth and the length of its literal strings, and some keywords are
refused: those that hold regular expressions, since no request gets to run one, and `multipleOf`, whose automaton grows
with the divisor (7 seconds for 999983). Everything else is for the engine to accept or refuse. Enter at `structure_of`.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from server.engines.base import Engine
from server.errors import InvalidRequestError

MAX_SCHEMA_CHARS = 32_768
MAX_SCHEMA_DEPTH = 64
MAX_LITERAL_CHARS = 512
_REGEX = "regular expressions from requests are not run; use enum, format, minLength or maxLength"
_REFUSED = {
    "pattern": _REGEX,
    "patternProperties": _REGEX,
    "multipleOf": "not supported",
    "x-guidance": "not supported",
}
# Keywords whose value maps names to schemas, and those whose value is no schema.
_MAPS = frozenset({"properties", "$defs", "definitions", "dependentSchemas"})
_LITERALS = frozenset({"const", "enum", "default", "examples", "required"})
# Not into a literal, where nothing has been looked at.
_REF = re.compile(r"#(/(\$defs|definitions)/[\w.-]+)?", re.ASCII)


def check_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for a schema that is too large, or holds what is refused."""
    try:
        num_chars = len(json.dumps(schema, allow_nan=False))
    except (ValueError, RecursionError) as error:
        raise ValueError("must be JSON, without NaN and infinity, and not nested so deeply") from error
    if num_chars > MAX_SCHEMA_CHARS:
        raise ValueError(f"has {num_chars} characters; at most {MAX_SCHEMA_CHARS} are allowed")
    left: list[tuple[Any, int, str]] = [(schema, 1, "schema")]
    while left:
        value, depth, kind = left.pop()
        if depth > MAX_SCHEMA_DEPTH:
            raise ValueError(f"is nested more than {MAX_SCHEMA_DEPTH} deep")
        if kind == "literal" and isinstance(value, str) and len(value) > MAX_LITERAL_CHARS:
            raise ValueError(f"a string that the text has to hold may have {MAX_LITERAL_CHARS} characters at most")
        if isinstance(value, list):
            left += [(item, depth + 1, kind) for item in value]
        elif isinstance(value, dict):
            for key, item in value.items():
                if kind == "schema":
                    _check_keyword(key, item)
                else:
                    left.append((key, depth, "literal"))
                left.append((item, depth + 1, _kind_within(kind, key)))
    return schema


def _check_keyword(key: str, value: Any) -> None:
    if key in _REFUSED:
        raise ValueError(f"{key}: {_REFUSED[key]}")
    if key == "$ref" and not (isinstance(value, str) and _REF.fullmatch(value)):
        raise ValueError("$ref: must be '#', or name a schema of the top level's $defs as '#/$defs/NAME'")


def _kind_within(kind: str, key: str) -> str:
    if kind == "map":
        return "schema"
    if kind == "literal" or key in _LITERALS:
        return "literal"
    return "map" if key in _MAPS else "schema"


class TextFormat(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: Literal["text"]


class JsonObjectFormat(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: Literal["json_object"]


class NamedSchema(BaseModel):
    """OpenAI's wrapper. A schema always holds, so `strict` changes nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")]
    description: Annotated[str, Field(max_length=1024)] | None = None
    schema_: Annotated[dict[str, Any], AfterValidator(check_schema), Field(alias="schema")]
    strict: bool | None = None


class JsonSchemaFormat(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


async def structure_of(response_format: ResponseFormat | None, engine: Engine) -> object | None:
    """What the engine has to hold a text to; None for plain text. Raises InvalidRequestError, which names the field."""
    if response_format is None or isinstance(response_format, TextFormat):
        return None
    schema, field = {"type": "object"}, "response_format"
    if isinstance(response_format, JsonSchemaFormat):
        schema, field = response_format.json_schema.schema_, "response_format.json_schema.schema"
    try:
        return await engine.compile_schema(json.dumps(schema))
    except InvalidRequestError as error:
        raise type(error)(f"{field}: {error.message}", param=field) from error
