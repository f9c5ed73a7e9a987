"""The ways to guard that the study compares: each the `control` of its requests. To try another, add an arm.

Knows nothing of servers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NO_GUARD, STOP, HELD = "no guardrail", "stop", "stop, 8 held"
_HOLD_TOKENS = 8
_RETRY: Mapping[str, Any] = {"type": "retry", "max_retries": 8, "hold_tokens": _HOLD_TOKENS}
# So small that it moves nothing to speak of before the first retry.
_START = {"step_size": 0.02}


def arms(head: str, bound: float) -> dict[str, dict[str, Any]]:
    """The control of each arm, by its name in the tables; none of them ascends unless it says so."""
    objective = {"objective": {"weights": {head: 1.0}}}
    still, bounds = {**objective, "steps": 0}, {"stop_below": {head: bound}}
    stronger = {"step_growth": 2.0, "rewind_tokens": 4}
    return {
        NO_GUARD: still,
        STOP: {**still, **bounds},
        HELD: {**still, **bounds, "on_stop": {"type": "stop", "hold_tokens": _HOLD_TOKENS}},
        "replace": {**still, **bounds, "on_stop": {"type": "replace", "hold_tokens": _HOLD_TOKENS}},
        "retry": {**still, **bounds, "on_stop": dict(_RETRY)},
        "retry, 4 back": {**still, **bounds, "on_stop": {**_RETRY, "rewind_tokens": 4}},
        "retry, 4 back, stronger": {**objective, **_START, **bounds, "on_stop": {**_RETRY, **stronger}},
        "control": objective,
        "control, retry": {**objective, **bounds, "on_stop": {**_RETRY, "rewind_tokens": 4}},
    }
