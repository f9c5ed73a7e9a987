"""How a part of a request's control is read from the wire. Enter at `WireModel`."""

from __future__ import annotations

from typing import Any, cast

from pydantic import BaseModel, ConfigDict, model_validator


class WireModel(BaseModel):
    """Unknown keys are refused, types are strict, and null means a field's default, as everywhere in a body."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        fields = cast("dict[Any, Any]", given)
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: value for name, value in fields.items() if value is not None or name not in optional}
