"""What is sent: requests of mixed kinds and the faults among them, all drawn from one seed.

The plan says what to send, what its client does meanwhile and what must come back; it knows nothing of how fast the
server is, so the same seed asks for the same things. Enter at `make_plan`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.soak.bad_input import Refused, bad_input
from tests.soak.bodies import CHAT, COMPLETIONS, RESPONSES, World, draw, is_forced, is_held, limit_of

RECEIVE_TIMEOUT_S = 4.0
"""What the soaked server is told: the time in which a body has to come ..."""
SEND_TIMEOUT_S = 2.0
"""... and the time after which a client that reads nothing is let go."""
_MAX_FAULTY_TOKENS = 60
"""Of requests that are not meant to end by themselves."""
_UNREAD_TOKENS, _UNREAD_CHOICES, _UNREAD_TOP = 64, 4, 20
"""What comes to more than a connection takes that nobody reads."""
_UNREAD_S = 5 * SEND_TIMEOUT_S
_NAMES = {COMPLETIONS: "completion", CHAT: "chat", RESPONSES: "response"}
_SHARES = {
    "": 58,
    "bad input": 14,
    "disconnect": 5,
    "cancel": 5,
    "deadline": 5,
    "retry": 6,
    "slow body": 3,
    "late reader": 2,
    "unread": 0.7,
    "cut body": 0.8,
    "crowd": 0.5,
}
"""Faults, and how many requests of a hundred have each."""
FAULTS = tuple(filter(None, _SHARES))


@dataclass(slots=True, frozen=True)
class Pace:
    """How slow a client is, on a connection of its own."""

    body_s: float = 0.0
    """Between two pieces of the body, of which there are four."""
    is_body_cut: bool = False
    """Half of the body never comes."""
    unread_s: float = 0.0
    """After the headers of the answer, in which nothing is read."""
    leaves: bool = False
    """Then the client goes."""


@dataclass(slots=True, frozen=True)
class Planned:
    """One request. `fault` is what its client, or the body itself, does to it."""

    number: int
    path: str
    body: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None
    """`disconnect` after `leave_after` events, `cancel` after `leave_after` seconds, `deadline`, `bad input`, `retry`
    twice after `leave_after` seconds, `slow body`, `cut body`, `late reader` and `unread` at their `pace`, or `crowd`:
    so many connections beside it that there is no room."""
    leave_after: float = 0.0
    refused: Refused | None = None
    """With bad input: what is sent in place of path and body, and what must come back."""
    pace: Pace | None = None

    @property
    def is_streamed(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def num_choices(self) -> int:
        prompt = self.body.get("prompt", "")
        is_list = isinstance(prompt, list) and not isinstance(prompt[0], int)
        return (len(prompt) if is_list else 1) * self.body.get("n", 1)

    @property
    def is_controlled(self) -> bool:
        return "control" in self.body or "@" in self.body["model"]

    @property
    def kind(self) -> str:
        """The route, whether tools are offered, and whether it is streamed."""
        if self.refused is not None:
            return "bad input"
        tools = " with tools" if "tools" in self.body else ""
        tools = " with forced calls" if is_forced(self.body) else tools
        return _NAMES[self.path] + tools + (", streamed" if self.is_streamed else "")

    @property
    def features(self) -> list[str]:
        """Of a body that is served, for the report's counts."""
        names = ("echo", "logprobs", "stop", "stop_token_ids", "logit_bias", "presence_penalty", "frequency_penalty",
                 "repetition_penalty", "min_p", "top_k", "top_p", "ignore_eos", "stream_options", "tools",
                 "include_reasoning", "instructions")  # fmt: skip
        found = [name for name in names if self.body.get(name) not in (None, False)]
        found += ["control"] * self.is_controlled
        control = self.body.get("control")
        if control is not None:
            found.append(f"control.objective: {control['objective']['type']}")
            found += [f"control.{name}" for name in control if name != "objective"]
        found += ["held to a grammar"] * is_held(self.body)
        found += ["several choices"] * (self.body.get("n", 1) > 1)
        found += ["several prompts"] * (self.num_choices > self.body.get("n", 1))
        return found

    def alone(self) -> dict[str, Any]:
        """The same body to be run again by itself, whole where it was streamed and streamed where it was whole."""
        body = {name: value for name, value in self.body.items() if name not in ("stream_options", "timeout_s")}
        return {**body, "stream": not self.is_streamed}


def make_plan(seed: int, count: int, world: World) -> list[Planned]:
    """`count` requests; every kind of bad input comes by turns, the rest by chance."""
    rng = random.Random(seed)
    faults = rng.choices(list(_SHARES), weights=list(_SHARES.values()), k=count)
    # A short plan has each of them too.
    for fault, place in zip(FAULTS, range(0, count, max(1, count // len(FAULTS))), strict=False):
        faults[place] = fault
    bad = _by_turns(rng, bad_input(world.model, world.max_len))
    plan = []
    for number, fault in enumerate(faults):
        if fault == "bad input":
            refused = bad()
            plan.append(Planned(number, refused.path, fault=fault, refused=refused))
        else:
            plan.append(_served(rng, number, fault or None, world))
    return plan


def _by_turns(rng: random.Random, items: list[Refused]) -> Callable[[], Refused]:
    """All of them, in an order of its own each time round."""
    left: list[Refused] = []

    def take() -> Refused:
        if not left:
            left.extend(rng.sample(items, len(items)))
        return left.pop()

    return take


def _served(rng: random.Random, number: int, fault: str | None, world: World) -> Planned:
    path, body = draw(rng, world)
    leave_after = 0.0
    if fault in ("disconnect", "cancel", "deadline"):
        body[limit_of(body)] = rng.randint(20, _MAX_FAULTY_TOKENS)
        if not is_held(body):
            body["ignore_eos"] = True
        body.pop("stop", None)
    if fault == "disconnect":
        body["stream"] = True
        leave_after = rng.randrange(0, 20)
    elif fault == "cancel":
        leave_after = rng.choice([0.0, 0.002, 0.02, rng.uniform(0, 1.0)])
    elif fault == "retry":
        leave_after = rng.choice([0.02, 0.2, rng.uniform(0, 1.0)])
    elif fault == "deadline":
        body["timeout_s"] = rng.choice([1e-6, 0.01, rng.uniform(0.01, 3.0), rng.uniform(1.0, 20.0)])
    elif fault == "cut body":
        content = json.dumps(body).encode()
        refused = Refused("a body that stops coming", path, content, 408, code="request_timeout")
        return Planned(number, path, fault=fault, refused=refused, pace=Pace(is_body_cut=True))
    elif fault == "unread":
        path, body = _too_much_to_be_kept(path, body)
    elif fault == "late reader":
        body["stream"] = True
    return Planned(number, path, body, fault, leave_after, pace=_pace(rng, fault))


def _pace(rng: random.Random, fault: str | None) -> Pace | None:
    if fault == "slow body":
        return Pace(body_s=rng.uniform(0, 0.3))
    if fault == "late reader":
        return Pace(unread_s=rng.uniform(0, 1.0))
    return Pace(unread_s=_UNREAD_S, leaves=True) if fault == "unread" else None


def _too_much_to_be_kept(path: str, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A streamed body of several choices with many log-probabilities, which nothing ends early."""
    kept = ("model", "seed", "user", "prompt", "messages", "control", "temperature")
    body = {name: value for name, value in body.items() if name in kept}
    if path == RESPONSES:
        path, body = COMPLETIONS, {**body, "prompt": "Once upon a time"}
    asked: dict[str, Any] = {"logprobs": _UNREAD_TOP}
    if path == CHAT:
        asked = {"logprobs": True, "top_logprobs": _UNREAD_TOP}
    size = {"max_tokens": _UNREAD_TOKENS, "n": _UNREAD_CHOICES, "ignore_eos": True}
    return path, {**body, **asked, **size, "stream": True}
