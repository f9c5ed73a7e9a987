"""The `control` of a body, drawn at random: every objective and condition. Enter at `draw_control`."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any


def draw_control(rng: random.Random, heads: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """`control` of a body; levels lie about each head's mean, in units of its scale.

    They do not go as far as 1.25 of it, beyond which control was not seen to lead for every head that ships.
    """
    names = rng.sample(sorted(heads), rng.randint(1, min(3, len(heads))))

    def level(name: str) -> float:
        mean, scale = heads[name]
        return mean + scale * rng.uniform(-1.2, 1.2)

    side = rng.choice(["below", "above"])
    conditions: dict[str, tuple[float, Callable[[], Any]]] = {
        "step_size": (0.5, lambda: rng.choice([0.0, 0.12, 1.0, 10.0])),
        "steps": (0.4, lambda: rng.choice([0, 1, 10, 30])),
        "max_kl": (0.5, lambda: rng.choice([0.01, 0.1, 0.3, 0.5])),
        "max_shift": (0.2, lambda: rng.choice([0.05, 1.0, 2.0])),
        "max_response_kl": (0.2, lambda: rng.choice([0.1, 2.0])),
        "gate": (0.2, lambda: {"head": names[0], side: level(names[0]), "hysteresis": rng.choice([0.0, 0.1])}),
        "window": (0.2, lambda: rng.choice([{"start": 2}, {"end": 5}, {"start": 1, "end": 9}])),
        "schedule": (0.2, lambda: _schedule(rng)),
        "stop_below": (0.1, lambda: {names[0]: level(names[0])}),
        "trace": (0.15, lambda: True),
        "phase": (0.15, lambda: rng.choice(["answer", "both"])),
        "in_calls": (0.15, lambda: rng.random() < 0.5),
    }
    chosen = {name: draw() for name, (share, draw) in conditions.items() if rng.random() < share}
    if "stop_below" in chosen:
        chosen |= rng.choice(_REPAIRS)
    return {"objective": _objective(rng, names, level), **chosen}


_IN_VALUE = 0.3
"""Share of levels that are those of the value and not of the reward."""
_REPAIRS: list[dict[str, Any]] = [
    {},
    {"on_stop": "retry"},
    {"on_stop": {"type": "retry", "max_retries": 8, "rewind_tokens": 4, "step_growth": 1.5, "then": "replace"}},
    {"on_stop": {"type": "replace", "hold_tokens": 2, "replacement": "No more of this."}},
    {"on_stop": {"type": "stop", "hold_tokens": 16}},
]


def _objective(rng: random.Random, names: list[str], level: Callable[[str], float]) -> dict[str, Any]:
    weights = {name: rng.choice([-1.0, 0.5, 1.0, 3.0]) for name in names}
    kinds = ["weighted_sum", "weighted_sum", "worst_case", "target", *(["floor"] if len(names) > 1 else [])]
    kind = rng.choice(kinds)
    unit = {"unit": "value"} if rng.random() < _IN_VALUE else {}
    if kind == "target":
        return {"type": kind, "values": {name: level(name) for name in names}, **unit}
    if kind == "floor":
        return {"type": kind, "weights": {names[0]: 1.0}, "floors": {name: level(name) for name in names[1:]}, **unit}
    return {"type": kind, "weights": weights}


def _schedule(rng: random.Random) -> dict[str, Any]:
    return rng.choice(
        [
            {"type": "constant"},
            {"type": "linear", "tokens": 8},
            {"type": "cosine", "tokens": 5, "to": 0.2},
            {"type": "exponential", "half_life": 3.0},
        ]
    )
