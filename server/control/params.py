"""What a request asks of control: an objective, how far to ascend it, its budgets, when it acts, and search by value.

Only the wire format, whose texts /openapi.json shows; what control does with it is in plan.py and editor.py, and the
engine searches (`server/engines/embedded/candidates.py`). Knows nothing of models, hidden states or HTTP. Enter at
`ControlParams`; to add a way to search, write one class beside `Blocks`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from server.control.conditions import Gate, Schedule, Window
from server.control.objectives import (
    MAX_HEADS_PER_REQUEST,
    MAX_UNITS_PER_REQUEST,
    NO_HEADS,
    Floor,
    HeadsObjective,
    Instruction,
    Levels,
    Objective,
    WeightedSum,
)
from server.control.repair import OnStop, Retry, Stop
from server.control.state import Segment
from server.control.turns import OverTurns, Turn
from server.control.wire import WireModel
from server.errors import ConfigurationError, InvalidRequestError
from server.field_errors import field_error

# Ranges whose corners the stress study of the shipped heads measures: the text keeps most of its diversity there.
MAX_STEP_SIZE = 10.0
MAX_STEPS = 100
MAX_KL_NATS = 0.5
MAX_SHIFT_RATIO = 2.0
MAX_RESPONSE_KL_NATS = 10_000.0
MAX_CANDIDATES = 32
MAX_BLOCK_TOKENS = 4096
MAX_REWARD_CHARS = 64

TokenBudget = Annotated[FiniteFloat, Field(gt=0.0, le=MAX_KL_NATS)]
"""How much divergence is allowed, in nats a token."""
Phase = Literal["answer", "reasoning", "both"]


class Blocks(WireModel):
    """Sample so many continuations of `block_tokens` tokens, keep the best, and go on from there.

    Candidate 0 of every block draws from the choice's own stream, candidate j from the one keyed by seed, choice and j;
    a number of a stream is keyed by the token's place in the response, so one candidate gives what no search gives.
    """

    type: Literal["blocks"]
    candidates: Annotated[int, Field(ge=1, le=MAX_CANDIDATES)] = 4
    block_tokens: Annotated[int, Field(ge=1, le=MAX_BLOCK_TOKENS)] = 8
    reward: Annotated[str, Field(min_length=1, max_length=MAX_REWARD_CHARS)] | None = None
    """By what the texts so far are compared, a reward that the operator has registered; by default by the objective."""


class ControlParams(WireModel):
    """One request's control: ascend `objective` by `steps` steps of `step_size`, within every budget.

    An ascent of length steps x step_size = 1 costs a trained head 0.1 nats a token on average
    (value_models/ascent.py). The defaults were measured (docs/tried.md). `gate`, `window` and `schedule` say
    when it acts and how strongly (server/control/conditions.py). What is below a field is its text in /openapi.json.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    objective: Objective
    step_size: Annotated[FiniteFloat, Field(ge=0.0, le=MAX_STEP_SIZE)] = 0.12
    """Length of an ascent step."""
    steps: Annotated[int, Field(ge=0, le=MAX_STEPS)] = 10
    """Ascent steps a token."""
    max_kl: TokenBudget = 0.3
    """Nats a token: KL(controlled || base) at temperature 1, before sampling filters."""
    max_shift: Annotated[FiniteFloat, Field(gt=0.0, le=MAX_SHIFT_RATIO)] = 1.0
    """Length of the shift over the length of the hidden state."""
    max_response_kl: Annotated[FiniteFloat, Field(gt=0.0, le=MAX_RESPONSE_KL_NATS)] | None = None
    """Nats a response: the sum of its tokens' KL."""
    phase: Phase = "both"
    """The parts of a response on which control acts, where the model's chat template marks reasoning."""
    in_calls: bool = False
    """Whether control acts within calls of tools too, where it may break their syntax or change their arguments."""
    gate: Gate | None = None
    window: Window | None = None
    schedule: Schedule | None = None
    stop_below: Levels | None = None
    """End the response at the token whose state, after control, has a value below its head's bound."""
    on_stop: OnStop = Stop()
    """What is done there instead, and how much of the text is held back until it is safe."""
    search: Blocks | None = None
    """Try several continuations and keep the best by the objective, beside the ascent or, with `steps` 0, alone."""
    trace: bool = False
    """Report what control did to each token, beside the summary of each choice."""
    over_turns: OverTurns | None = None
    """How the bounds of `stop_below` and `floors` change over the turns of a conversation."""

    @model_validator(mode="after")
    def _changes_bounds_that_there_are(self) -> ControlParams:
        for field, rules in (self.over_turns.rules if self.over_turns is not None else {}).items():
            bounds = self.bounds[field]
            for head, rule in rules.items():
                name, problem = f"over_turns.{field}.{head}", None
                if head not in bounds:
                    where = "stop_below" if field == "stop_below" else "an objective of type floor"
                    problem = f"has no bound in {where} that could change over turns"
                elif rule.to is not None and rule.to < bounds[head]:
                    name, problem = f"{name}.to", f"must be {bounds[head]:g}, the bound that rises to it, or more"
                if problem is not None:
                    raise field_error(name, problem)
        return self

    @model_validator(mode="after")
    def _names_few_heads(self) -> ControlParams:
        if len(self.named_heads) > MAX_HEADS_PER_REQUEST:
            raise ValueError(f"at most {MAX_HEADS_PER_REQUEST} heads may be named in all")
        return self

    @model_validator(mode="after")
    def _repairs_a_guardrail(self) -> ControlParams:
        if self.on_stop != Stop() and self.stop_below is None:
            raise ValueError("on_stop goes with stop_below, which has the bounds")
        if self.repairs and self.search is not None:
            raise ValueError(f"search goes with on_stop stop alone, without hold_tokens; not with {self.on_stop.type}")
        if isinstance(self.on_stop, Retry) and isinstance(self.objective, Instruction):
            raise ValueError("on_stop retry does not go with an instruction, whose reading cannot be taken back")
        return self

    @property
    def named_heads(self) -> dict[str, str]:
        """Every head that is named, with the field that names it."""
        heads = {name: f"control.objective.{field}" for name, field in self.objective.named_heads.items()}
        if self.gate is not None:
            heads.setdefault(self.gate.head, "control.gate.head")
        for name in self.stop_below or ():
            heads.setdefault(name, "control.stop_below")
        return heads

    @property
    def head_names(self) -> tuple[str, ...]:
        """The heads that are named anywhere in it, in a fixed order."""
        return tuple(sorted(self.named_heads))

    @property
    def bounds(self) -> dict[str, dict[str, float]]:
        """What may change over turns: bounds by field and head."""
        floors = self.objective.floors if isinstance(self.objective, Floor) else {}
        return {"stop_below": self.stop_below or {}, "floors": floors}

    def at_turn(self, turn: Turn, worst_of_floors: Mapping[str, float] | None = None) -> ControlParams:
        """With the bounds of that turn, which stay.

        `worst_of_floors` stands in place of `turn.worst` for floors, which may be in another unit.
        """
        if self.over_turns is None:
            return self
        turns = {"floors": turn if worst_of_floors is None else replace(turn, worst=worst_of_floors)}
        now = {
            field: self.over_turns.bounds(field, bounds, turns.get(field, turn))
            for field, bounds in self.bounds.items()
        }
        changed: dict[str, Any] = {"over_turns": None, "stop_below": now["stop_below"] or None}
        if isinstance(self.objective, Floor):
            changed["objective"] = self.objective.model_copy(update={"floors": now["floors"]})
        return self.model_copy(update=changed)

    @property
    def heads_objective(self) -> HeadsObjective:
        """What its objective asks of heads."""
        objective = self.objective
        return objective if not isinstance(objective, Instruction) else objective.beside or NO_HEADS

    @property
    def instruction(self) -> Instruction | None:
        """The instruction that it follows; None also where it would change nothing, so that nobody need read it."""
        objective = self.objective
        if not isinstance(objective, Instruction):
            return None
        return objective if objective.weight and self.steps and self.step_size else None

    def acts_on(self, segment: Segment | None) -> bool:
        """Whether a token of this part is drawn under control; None is one that may still begin either.

        A call of a tool is the answer's, and left alone unless `in_calls` is set.
        """
        if segment is Segment.CALL:
            return self.in_calls and self.phase != "reasoning"
        return self.phase in ("both", segment)

    @property
    def repairs(self) -> bool:
        """Whether its guardrail does more than to end the response at the token, or holds tokens back."""
        return self.stop_below is not None and (self.on_stop.type != "stop" or self.on_stop.hold_tokens > 0)

    @property
    def max_redrawn(self) -> int:
        """Tokens that its guardrail may draw and take back, beside those that are kept."""
        if not isinstance(self.on_stop, Retry) or self.stop_below is None:
            return 0
        return self.on_stop.max_retries * (self.on_stop.rewind_tokens + 1)

    def may_retry(self, value_after: Mapping[str, float]) -> bool:
        """Whether a bound is broken for which tokens may be drawn again."""
        return isinstance(self.on_stop, Retry) and self.breaks_guardrail(value_after)

    def strengthened(self, num_retries: int) -> ControlParams:
        """This control after so many retries: larger steps, where that is asked for, within the same budgets."""
        growth = self.on_stop.step_growth if isinstance(self.on_stop, Retry) else 1.0
        if growth == 1.0 or self.steps == 0:
            return self
        # What is unchecked may have larger steps already; they never become smaller.
        largest = max(MAX_STEP_SIZE, self.step_size)
        return self.model_copy(update={"step_size": min(self.step_size * growth**num_retries, largest)})

    def breaks_guardrail(self, value_after: Mapping[str, float]) -> bool:
        return bool(self.broken_bounds(value_after))

    def broken_bounds(self, value_after: Mapping[str, float]) -> dict[str, float]:
        """The bounds of the heads whose value is below them, or is no number."""
        return {name: bound for name, bound in (self.stop_below or {}).items() if not value_after[name] >= bound}

    @classmethod
    def from_json(cls, text: str, setting: str) -> ControlParams:
        """Parse the JSON of a user's setting, as in a request. Raises ConfigurationError, which names the setting."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            problems = (": ".join([".".join(map(str, e["loc"])), e["msg"]]).removeprefix(": ") for e in error.errors())
            raise ConfigurationError(f"{setting}: {'; '.join(problems)}") from error

    @classmethod
    def for_head(cls, name: str, *, weight: float = 1.0, **fields: Any) -> ControlParams:
        """One head's ascent, by default as behind the model id `base@name`; `fields` are others of the request's."""
        return cls(objective=WeightedSum(weights={name: weight}), **fields)

    @classmethod
    def without_limits(
        cls, objective: Objective, *, step_size: float, steps: int, max_kl: float = math.inf
    ) -> ControlParams:
        """Control as first published, any size of step and no bound: for evaluation, which shows how it collapses.

        It is unchecked on purpose; a request cannot ask for it.
        """
        return cls.model_construct(
            objective=objective, step_size=step_size, steps=steps, max_kl=max_kl, max_shift=math.inf
        )


class UnderPinned(ControlParams):
    """A caller's control on top of what a server pins; put together by the server and never taken from a request.

    `pinned` acts first, as if it were alone. What the caller's heads ask for is added as far as the budgets, which are
    the larger of both, leave room and no pinned head is taken back (pinned.py). `objective` has the weights of both.
    """

    pinned: ControlParams

    def may_retry(self, value_after: Mapping[str, float]) -> bool:
        """For a pinned bound alone: to draw again until a caller's head is content would be a search by that head."""
        return isinstance(self.on_stop, Retry) and self.pinned.breaks_guardrail(value_after)

    def strengthened(self, num_retries: int) -> ControlParams:
        pinned = self.pinned.strengthened(num_retries)
        return super().strengthened(num_retries).model_copy(update={"pinned": pinned})

    @property
    def own_weights(self) -> dict[str, float]:
        """Those of the caller's heads."""
        pinned = self.pinned.objective.head_weights
        return {name: weight for name, weight in self.objective.head_weights.items() if name not in pinned}


def check_units(
    control: ControlParams, num_units: Mapping[str, int], *, told_by: Mapping[str, str] | None = None
) -> None:
    """Refuse heads that have too many units together, of which they take memory by the square.

    `num_units` are by head; `told_by` are fields that name heads, by default the control's own. Raises
    InvalidRequestError.
    """
    named = {**control.named_heads, **(told_by or {})}
    units = {name: num_units.get(name, 1) for name in control.head_names}
    if sum(units.values()) > MAX_UNITS_PER_REQUEST:
        field = named[max(units, key=units.__getitem__)]
        raise InvalidRequestError(
            f"{field}: these heads have {sum(units.values())} units together; at most {MAX_UNITS_PER_REQUEST} are "
            "allowed",
            param=field,
        )
