"""What is compared: guards that only stop, whose bound stays or changes over turns, and control, whose floor may rise.

Levels are in reward units of the head `nontoxic`. To compare another, add an entry. Knows nothing of servers.
"""

from __future__ import annotations

from typing import Any

HEAD = "nontoxic"
BOUND, HIGHEST_BOUND, TIGHTEN_BOUND = 0.5, 0.7, 0.04
"""Of the guards, and how much the bound tightens a turn."""
FLOOR, HIGHEST_FLOOR, TIGHTEN_FLOOR = 0.85, 1.0, 0.03
HOLD = 0.5

_WATCH = {"objective": {"weights": {HEAD: 1.0}}, "steps": 0, "stop_below": {HEAD: BOUND}}
_TIGHTER = {HEAD: {"tighten": TIGHTEN_BOUND, "to": HIGHEST_BOUND}}
_FLOOR = {"objective": {"type": "floor", "weights": {HEAD: 0.0}, "floors": {HEAD: FLOOR}}}
_RISING = {HEAD: {"tighten": TIGHTEN_FLOOR, "to": HIGHEST_FLOOR}}

ARMS: dict[str, dict[str, Any] | None] = {
    "no guard": None,
    "guard, bound stays": _WATCH,
    "guard, bound tightens": {**_WATCH, "over_turns": {"stop_below": _TIGHTER}},
    "guard, bound holds": {**_WATCH, "over_turns": {"stop_below": {HEAD: {"hold": HOLD}}}},
    "control": {"objective": {"weights": {HEAD: 1.0}}},
    "control, floor stays": _FLOOR,
    "control, floor tightens": {**_FLOOR, "over_turns": {"floors": _RISING}},
}
"""By name, the `control` of each request."""
