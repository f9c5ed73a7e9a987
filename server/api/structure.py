"""`response_format`: plain text, any JSON object, or JSON that holds a schema; what a schema may look like. The same
under vLLM's names (`structured_outputs`, `guided_json`), and texts that are one of a few choices.

A schema of strangers is bounded here in size, depth and the length of its literal strings, and some keywords are
refused: those that hold regular expressions, since no request gets to run one, and `multipleOf`, whose automaton grows
with the divisor (7 seconds for 999983). Everything else is for the engine to accept or refuse. Enter at `structure_of`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from server.api.unserved import STRUCTURE, Unserved, WithUnserved
from server.engines.base import Engine
from server.errors import InvalidRequestError
from server.unicode import check_text

MAX_SCHEMA_CHARS = 32_768
MAX_SCHEMA_DEPTH = 64
MAX_LITERAL_CHARS = 512
MAX_TEXT_CHOICES = 1024
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


class Structure(NamedTuple):
    """What a text has to hold, and the part of the field that names it, where that is not the whole field."""

    wanted: dict[str, Any] | list[str]
    """A schema, or choices."""
    part: str = ""


ANY_OBJECT = Structure({"type": "object"})


class TextFormat(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: Literal["text"]


class JsonObjectFormat(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: Literal["json_object"]

    @property
    def structure(self) -> Structure:
        return ANY_OBJECT


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

    @property
    def structure(self) -> Structure:
        return Structure(self.json_schema.schema_, ".json_schema.schema")


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


def _parsed(schema: Any) -> Any:
    """vLLM's clients may send a schema as a string."""
    if not isinstance(schema, str):
        return schema
    if len(schema) > MAX_SCHEMA_CHARS:
        raise ValueError(f"has {len(schema)} characters; at most {MAX_SCHEMA_CHARS} are allowed")
    try:
        return json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise ValueError("must be a JSON schema, as an object or as a string that holds one") from error


def _check_choices(choices: list[str]) -> list[str]:
    num_chars = sum(map(len, choices))
    if num_chars > MAX_SCHEMA_CHARS:
        raise ValueError(f"have {num_chars} characters together; at most {MAX_SCHEMA_CHARS} are allowed")
    return [check_text(choice) for choice in choices]


AnySchema = Annotated[
    dict[str, Any],
    BeforeValidator(_parsed, json_schema_input_type=dict[str, Any] | str),
    AfterValidator(check_schema),
]
TextChoices = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_LITERAL_CHARS)]],
    Field(min_length=1, max_length=MAX_TEXT_CHOICES),
    AfterValidator(_check_choices),
]


class StructuredOutputs(WithUnserved):
    """vLLM's field: one of these."""

    unserved: ClassVar[Mapping[str, Unserved]] = STRUCTURE
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    json_: Annotated[AnySchema | None, Field(alias="json")] = None
    choice: TextChoices | None = None
    json_object: bool | None = None

    @model_validator(mode="after")
    def _is_one(self) -> StructuredOutputs:
        if sum((self.json_ is not None, self.choice is not None, bool(self.json_object))) != 1:
            raise ValueError("give one of json, choice, json_object")
        return self

    @property
    def structure(self) -> Structure:
        if self.json_ is not None:
            return Structure(self.json_, ".json")
        return ANY_OBJECT if self.choice is None else Structure(self.choice, ".choice")


async def structure_of(structures: Mapping[str, Structure], engine: Engine) -> object | None:
    """What the engine has to hold a text to; None for plain text. Raises InvalidRequestError, which names the field."""
    field, wanted = wanted_structure(structures)
    try:
        if isinstance(wanted, list):
            return await engine.compile_choices(wanted)
        return None if wanted is None else await engine.compile_schema(json.dumps(wanted))
    except InvalidRequestError as error:
        raise type(error)(f"{field}: {error.message}", param=field) from error


def wanted_structure(structures: Mapping[str, Structure]) -> tuple[str, dict[str, Any] | list[str] | None]:
    """The field that asks for something, of which there is one at most, and the schema or the choices that it names."""
    return next(((name + part, wanted) for name, (wanted, part) in structures.items()), ("", None))
