"""Bodies that hold far more than any has a place for, refused before each part of them is looked at.

pydantic finds everything that is wrong with a body, which for two megabytes of it takes a second. Enter at
`refuse_flood`.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from server.field_errors import UNKNOWN, field_error
from server.unicode import beginning

MAX_MEMBERS = 2**15
"""Of all objects and lists of a field together; token ids do not count."""
_FEW = 16


def refuse_flood(model: type[BaseModel], body: Any) -> None:
    """Raises PydanticCustomError that names the field: of type UNKNOWN where there are many that the model lacks."""
    if not isinstance(body, dict):
        return
    allowed = [field.alias or name for name, field in model.model_fields.items()]
    if len(body) > len(allowed) + _FEW:
        name = beginning(next(name for name in body if name not in allowed))
        raise field_error(name, f"there is no such field. Allowed here: {', '.join(allowed)}.", UNKNOWN)
    for name, value in body.items():
        if isinstance(value, dict | list) and _has_many(value):
            raise field_error(beginning(name), f"holds more than {MAX_MEMBERS} fields and items in all")


def _has_many(value: dict[str, Any] | list[Any]) -> bool:
    num_members, left = 0, [value]
    while left:
        members = left.pop()
        if isinstance(members, list):
            # Of a million token ids the set of their types is made in a few milliseconds.
            members = [] if set(map(type, members)) == {int} else [item for item in members if type(item) is not int]
        num_members += len(members)
        if num_members > MAX_MEMBERS:
            return True
        items = members.values() if isinstance(members, dict) else members
        left += [item for item in items if type(item) in (dict, list)]
    return False
