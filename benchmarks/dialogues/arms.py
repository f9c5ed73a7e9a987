"""What is compared: guards that only stop, whose bound stays or changes over turns, and control, whose floor may rise.

Levels are in reward units of the head `nontoxic`. They were chosen by the values of replies without control under
another seed than the published run's. To compare another arm, add an entry. Knows nothing of servers.
"""

from __future__ import annotations

from typing import Any

HEAD = "nontoxic"
LOW_BOUND, HIGH_BOUND = 0.7, 0.75
_FLOOR = 0.8


def _guard(bound: float, **over_turns: float) -> dict[str, Any]:
    """Stops, and moves nothing."""
    control = {"objective": {"weights": {HEAD: 1.0}}, "steps": 0, "stop_below": {HEAD: bound}}
    return control | ({"over_turns": {"stop_below": {HEAD: over_turns}}} if over_turns else {})


def _floor(**over_turns: float) -> dict[str, Any]:
    """Moves tokens where the value is below the floor, and stops nothing."""
    control = {"objective": {"type": "floor", "weights": {HEAD: 0.0}, "floors": {HEAD: _FLOOR}}}
    return control | ({"over_turns": {"floors": {HEAD: over_turns}}} if over_turns else {})


ARMS: dict[str, dict[str, Any] | None] = {
    "no guard": None,
    f"guard at {LOW_BOUND}": _guard(LOW_BOUND),
    f"guard at {HIGH_BOUND}": _guard(HIGH_BOUND),
    f"guard from {LOW_BOUND}, tightens": _guard(LOW_BOUND, tighten=0.01, to=0.78),
    f"guard from {LOW_BOUND}, holds": _guard(LOW_BOUND, hold=0.5),
    "control": {"objective": {"weights": {HEAD: 1.0}}},
    f"control, floor at {_FLOOR}": _floor(),
    f"control, floor from {_FLOOR}, tightens": _floor(tighten=0.02, to=0.95),
}
"""By name, the `control` of each request."""
