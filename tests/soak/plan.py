"""What is sent: requests of mixed kinds and the faults among them, all drawn from one seed.

The plan says what to send and what must come back; it knows nothing of timing, so the same seed asks for the same
things however fast the server is. Enter at `make_plan`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.soak.bad_input import Refused, bad_input

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
_PROMPT_CHARS = 100
_MAX_NEW_TOKENS = 20
_MAX_FAULTY_TOKENS = 60
"""Of requests that are not meant to end by themselves."""
_STOPS = ("\n", " the", ".", "e", "and then", "zebra", "\n\n")


@dataclass(slots=True, frozen=True)
class World:
    """What the server that is asked has."""

    model: str
    max_len: int
    heads: Mapping[str, tuple[float, float]]
    """Name -> mean and scale of its reward."""
    texts: Sequence[str]
    """Prompts."""


@dataclass(slots=True, frozen=True)
class Planned:
    """One request. `fault` is what its client, or the body itself, does to it."""

    number: int
    path: str
    body: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None
    """`disconnect` after `leave_after` events, `cancel` after `leave_after` seconds, `deadline`, or `bad input`."""
    leave_after: float = 0.0
    refused: Refused | None = None
    """With bad input: what is sent in place of path and body, and what must come back."""

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
        if self.refused is not None:
            return "bad input"
        kind = "chat" if self.path == CHAT else "completion"
        kind += ", streamed" if self.is_streamed else ""
        return kind + (", controlled" if self.is_controlled else "")

    @property
    def features(self) -> list[str]:
        """Of a body that is served, for the report's counts."""
        names = ("echo", "logprobs", "stop", "stop_token_ids", "logit_bias", "presence_penalty", "frequency_penalty",
                 "repetition_penalty", "min_p", "top_k", "top_p", "ignore_eos", "stream_options")  # fmt: skip
        found = [name for name in names if self.body.get(name) not in (None, False)]
        control = self.body.get("control")
        if control is not None:
            found.append(f"control.objective: {control['objective']['type']}")
            found += [f"control.{name}" for name in control if name != "objective"]
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
    faults = rng.choices([None, "bad input", "disconnect", "cancel", "deadline"], weights=[68, 14, 6, 6, 6], k=count)
    bad = _by_turns(rng, bad_input(world.model, world.max_len))
    plan = []
    for number, fault in enumerate(faults):
        if fault == "bad input":
            refused = bad()
            plan.append(Planned(number, refused.path, fault=fault, refused=refused))
        else:
            plan.append(_served(rng, number, fault, world))
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
    is_chat = rng.random() < 0.4
    body: dict[str, Any] = {"model": world.model, "seed": rng.randrange(-(2**63), 2**63), "user": "soak"}
    body |= _chat(rng, world) if is_chat else _completion(rng, world)
    body |= _sampling(rng)
    if rng.random() < 0.5:
        body["stream"] = True
        if rng.random() < 0.5:
            body["stream_options"] = {"include_usage": True, "continuous_usage_stats": rng.random() < 0.3}
    if world.heads and rng.random() < 0.6:
        if rng.random() < 0.15:
            body["model"] = f"{world.model}@{rng.choice(sorted(world.heads))}"
        else:
            body["control"] = _control(rng, world.heads)
    leave_after = 0.0
    if fault is not None:
        limit = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
        body |= {limit: rng.randint(20, _MAX_FAULTY_TOKENS), "ignore_eos": True}
        body.pop("stop", None)
    if fault == "disconnect":
        body["stream"] = True
        leave_after = rng.randrange(0, 20)
    elif fault == "cancel":
        leave_after = rng.choice([0.0, 0.002, 0.02, rng.uniform(0, 1.0)])
    elif fault == "deadline":
        body["timeout_s"] = rng.choice([1e-6, 0.01, rng.uniform(0.01, 3.0), rng.uniform(1.0, 20.0)])
    return Planned(number, CHAT if is_chat else COMPLETIONS, body, fault, leave_after)


def _completion(rng: random.Random, world: World) -> dict[str, Any]:
    forms: list[Callable[[], Any]] = [
        lambda: _text(rng, world),
        lambda: _text(rng, world),
        lambda: [_text(rng, world) for _ in range(rng.randint(1, 3))],
        lambda: _token_ids(rng),
        lambda: [_token_ids(rng) for _ in range(rng.randint(1, 3))],
    ]
    body: dict[str, Any] = {"prompt": rng.choice(forms)(), "max_tokens": rng.randint(1, _MAX_NEW_TOKENS)}
    if rng.random() < 0.25:
        body["logprobs"] = rng.randint(0, 5)
    if rng.random() < 0.2:
        body["echo"] = True
        if rng.random() < 0.3:
            body["max_tokens"] = 0
    return body


def _chat(rng: random.Random, world: World) -> dict[str, Any]:
    messages = [{"role": "user", "content": _text(rng, world)}]
    if rng.random() < 0.3:
        messages.insert(0, {"role": "system", "content": "Answer in one sentence."})
    if rng.random() < 0.2:
        messages += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
    limit = rng.choice(["max_tokens", "max_completion_tokens"])
    body: dict[str, Any] = {"messages": messages, limit: rng.randint(1, _MAX_NEW_TOKENS)}
    if rng.random() < 0.25:
        body |= {"logprobs": True, "top_logprobs": rng.randint(0, 5)}
    return body


def _sampling(rng: random.Random) -> dict[str, Any]:
    """Each field in some requests, whatever the others are."""
    fields: dict[str, tuple[float, Callable[[], Any]]] = {
        "temperature": (0.8, lambda: rng.choice([0, 0.7, 1.0, 1.5])),
        "top_p": (0.2, lambda: rng.choice([0.5, 0.9, 1])),
        "top_k": (0.2, lambda: rng.choice([-1, 0, 1, 40])),
        "min_p": (0.15, lambda: rng.choice([0, 0.05, 0.5])),
        "n": (0.2, lambda: rng.choice([1, 2, 2, 3, 4])),
        "stop": (0.25, lambda: rng.choice([None, rng.choice(_STOPS), rng.sample(_STOPS, rng.randint(1, 4))])),
        "stop_token_ids": (0.1, lambda: rng.sample(range(256), 3)),
        "ignore_eos": (0.2, lambda: rng.random() < 0.5),
        "logit_bias": (0.1, lambda: {str(rng.randrange(256)): rng.uniform(-5, 5) for _ in range(3)}),
        "presence_penalty": (0.15, lambda: rng.uniform(-2, 2)),
        "frequency_penalty": (0.15, lambda: rng.uniform(-2, 2)),
        "repetition_penalty": (0.15, lambda: rng.uniform(0.5, 2)),
    }
    return {name: draw() for name, (share, draw) in fields.items() if rng.random() < share}


def _control(rng: random.Random, heads: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """`control` of a body; levels lie about each head's mean, in units of its scale."""
    names = rng.sample(sorted(heads), rng.randint(1, min(3, len(heads))))

    def level(name: str) -> float:
        mean, scale = heads[name]
        return mean + scale * rng.uniform(-1.5, 1.5)

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
    }
    chosen = {name: draw() for name, (share, draw) in conditions.items() if rng.random() < share}
    if "stop_below" in chosen:
        chosen |= rng.choice(_REPAIRS)
    return {"objective": _objective(rng, names, level), **chosen}


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
    if kind == "target":
        return {"type": kind, "values": {name: level(name) for name in names}}
    if kind == "floor":
        return {"type": kind, "weights": {names[0]: 1.0}, "floors": {name: level(name) for name in names[1:]}}
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


def _text(rng: random.Random, world: World) -> str:
    """A few beginnings come again and again, so that pages of them are shared; some are of odd characters."""
    if rng.random() < 0.05:
        return rng.choice(["\x00", "é" * 30, "🙂🙃" * 8, "<|im_end|>", " ", "\u202e abc", "a" * 120])
    text = rng.choice(world.texts)[:_PROMPT_CHARS]
    return (world.texts[0] + " " + text)[:_PROMPT_CHARS] if rng.random() < 0.3 else text


def _token_ids(rng: random.Random) -> list[int]:
    """Of the first 256, which any vocabulary has."""
    return [rng.randrange(256) for _ in range(rng.choice([1, 7, 64, 65, 90]))]
