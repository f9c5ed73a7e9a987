"""What a JSON schema is before a library of grammars sees it: annotations out, and bounds on what a text may cost.

A schema that is compiled must not fail in the middle of a text, so what would exhaust the library's limits there is
refused here. Messages name a keyword and, by JSON pointer, its place. Knows nothing of tokens. Enter at `prepared` and
`explained`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, TypeGuard

from server.errors import InvalidRequestError

# What llguidance holds a string to. Any other format is an annotation (JSON Schema 2020-12, validation, 7.2.1).
FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"}
)  # fmt: skip
# A string costs the lexer up to some 15 states a character, and an optional property the parser 4 items of a row.
MAX_STRING_CHARS = 8192
MAX_OPTIONAL_PROPERTIES = 450
_LARGEST = 10**18 - 1
"""Number that the library holds texts to; beyond it there is nothing, or a bound that is another one."""
_NEXT = 1e-12
"""From a whole number that is excluded to the next one that is allowed, where the library would let the number pass."""
_BOUNDS = frozenset({"minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"})
_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_SCHEMAS = frozenset(
    {"items", "additionalItems", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames",
     "unevaluatedItems", "unevaluatedProperties", "prefixItems", "allOf", "anyOf", "oneOf", "contentSchema"}
)  # fmt: skip
_PREFIX = re.compile(r"^(at \d+\(\d+\): )?(failed to compile JSON schema: )?")


def prepared(schema: str) -> str:
    """The schema without what asks for nothing. Raises InvalidRequestError for one whose texts could not be held."""
    try:
        parsed = json.loads(schema)
    except ValueError:
        return schema  # The library says what is wrong.
    is_merged = any(_merges_bounds(part) for _, part in subschemas(parsed))
    lengths: set[tuple[int | None, int | None]] = set()
    num_chars, num_optional = 0, 0
    for place, part in subschemas(parsed):
        if isinstance(part.get("format"), str) and part["format"] not in FORMATS:
            del part["format"]
        if part.get("uniqueItems") is False:
            del part["uniqueItems"]
        bounds = _length(part.get("minLength")), _length(part.get("maxLength"))
        if bounds not in lengths:
            lengths.add(bounds)
            num_chars += max((length for length in bounds if length is not None), default=0)
        if num_chars > MAX_STRING_CHARS:
            keyword = "maxLength" if "maxLength" in part else "minLength"
            raise InvalidRequestError(
                f"{place}/{keyword}: minLength and maxLength may come to {MAX_STRING_CHARS} characters at most, "
                "all different ones together"
            )
        _narrow(part, place, is_merged=is_merged)
        num_optional += _num_optional(part)
        if num_optional > MAX_OPTIONAL_PROPERTIES:
            raise InvalidRequestError(
                f"{place}/properties: at most {MAX_OPTIONAL_PROPERTIES} properties that are not required are allowed"
            )
    _check_references(parsed)
    return json.dumps(parsed)


def explained(message: str, schema: str) -> str:
    """An error of the library in the schema's own terms, on one line."""
    line = _PREFIX.sub("", message.partition("\n")[0])
    if "NoExtensionBias" in line:
        return "#: the schema refers to itself with nothing between, so no text can hold it"
    keywords = re.search(r"Unimplemented keys: (\[.*?\])", line)
    if keywords is None:
        return _of_numbers(line, schema)
    names = json.loads(keywords[1])
    places = [f"{place}/{name}" for place, part in subschemas(json.loads(schema)) for name in names if name in part]
    return f"{places[0] if places else names[0]}: this keyword is not supported"


def _of_numbers(line: str, schema: str) -> str:
    if "Failed to generate regex for" not in line and not line.startswith("regex parse error"):
        return line
    places = [f"{place}/{name}" for place, part in subschemas(json.loads(schema)) for name in part if name in _BOUNDS]
    return f"{places[0] if places else '#'}: no text can be held to such a range of numbers"


def _merges_bounds(part: dict[str, Any]) -> bool:
    """Whether bounds on one number may stand in several places."""
    return "allOf" in part or bool(_BOUNDS & part.keys() and {"anyOf", "oneOf", "$ref"} & part.keys())


def _narrow(part: dict[str, Any], place: str, *, is_merged: bool) -> None:
    """Bounds on numbers as the library holds texts to them, none wider than it was. Raises InvalidRequestError."""
    lower, upper = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
    for names, sign in ((lower, 1), (upper, -1)):
        for name in names:
            if not _is_number(bound := part.get(name)):
                continue
            if sign * bound > _LARGEST:
                raise InvalidRequestError(f"{place}/{name}: numbers are held to {-_LARGEST} to {_LARGEST}")
            part[name] = max(sign * bound, -_LARGEST) * sign
    for names, opposite, sign in ((lower, upper, 1), (upper, lower, -1)):
        others = [sign * other for other in map(part.get, opposite) if _is_number(other)]
        _exclude(part, *names, sign, -math.inf if is_merged else min(others, default=math.inf))


def _exclude(part: dict[str, Any], including: str, excluding: str, sign: int, end: float) -> None:
    """Of 0 < x < 0.5 the library would let 0 pass, so its bound becomes the next number. `end` is the opposite bound;
    with a negative sign all is the other way round."""
    excluded, included = part.get(excluding), part.get(including)
    if not _is_number(excluded) or excluded != int(excluded) or part.get("type") == "integer":
        return
    if end < sign * excluded + 1:
        del part[excluding]
        inner = sign * excluded + max(_NEXT, math.ulp(excluded))
        part[including] = sign * (max(inner, sign * included) if _is_number(included) else inner)


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def subschemas(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each schema within a schema, itself included, by JSON pointer (RFC 6901, as a URI fragment)."""
    left: list[tuple[str, Any]] = [("#", schema)]
    while left:
        place, part = left.pop()
        if not isinstance(part, dict):
            continue
        yield place, part
        for keyword, value in part.items():
            at = f"{place}/{_escaped(keyword)}"
            if keyword in _MAPS and isinstance(value, dict):
                left += [(f"{at}/{_escaped(name)}", item) for name, item in value.items()]
            elif keyword in _SCHEMAS:
                items = enumerate(value) if isinstance(value, list) else [(None, value)]
                left += [(at if index is None else f"{at}/{index}", item) for index, item in items]


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _length(given: Any) -> int | None:
    """A bound on a string's length; what is no number is for the library to refuse."""
    return given if type(given) is int else None


def _num_optional(part: dict[str, Any]) -> int:
    properties, required = part.get("properties"), part.get("required")
    if not isinstance(properties, dict):
        return 0
    names = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
    return len(properties.keys() - names)


def _check_references(schema: Any) -> None:
    """Raises InvalidRequestError for references that lead back to themselves with nothing between."""
    by_place = dict(subschemas(schema))
    for start, part in by_place.items():
        seen, at = {start}, part.get("$ref")
        while isinstance(at, str) and at in by_place:
            if at in seen:
                raise InvalidRequestError(
                    f"{start}/$ref: refers to itself with nothing between, so no text can hold the schema"
                )
            seen.add(at)
            at = by_place[at].get("$ref")
