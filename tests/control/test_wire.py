"""null in a request's control means the default, as everywhere in a body."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from server.control.params import ControlParams

OBJECTIVE = {"type": "weighted_sum", "weights": {"positive": 1.0}}
BARE = ControlParams.model_validate({"objective": OBJECTIVE})


@pytest.mark.parametrize("name", sorted(set(ControlParams.model_fields) - {"objective"}))
def test_null_is_the_default_of_every_field_that_has_one(name: str) -> None:
    assert ControlParams.model_validate({"objective": OBJECTIVE, name: None}) == BARE


@pytest.mark.parametrize(
    ("field", "given", "meant"),
    [
        ("search", {"type": "blocks", "candidates": None}, {"type": "blocks"}),
        ("window", {"start": None, "end": 3}, {"end": 3}),
        ("gate", {"head": "positive", "below": 0.5, "hysteresis": None}, {"head": "positive", "below": 0.5}),
        ("schedule", {"type": "linear", "tokens": 4, "to": None}, {"type": "linear", "tokens": 4}),
    ],
)
def test_null_is_the_default_within_a_field_too(field: str, given: dict[str, Any], meant: dict[str, Any]) -> None:
    fields = {"objective": OBJECTIVE}
    assert ControlParams.model_validate({**fields, field: given}) == ControlParams.model_validate(
        {**fields, field: meant}
    )


@pytest.mark.parametrize("given", [{"objective": None}, {"objective": OBJECTIVE, "strength": None}])
def test_null_stands_for_no_required_field_and_for_no_unknown_one(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ControlParams.model_validate(given)
