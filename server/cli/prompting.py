"""Prompting at its best: of some written instructions, in both of their places, the one of highest reward.

Chosen on validation prompts, in two rounds: all instructions in the system role on a few prompts, then the best of them
in both places on all. Knows nothing of models. Enter at `best_instruction`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from server.cli.arms import Instruction, Place
from server.cli.methods import Subject
from value_models.evaluation import Arm

_NUM_FIRST_PROMPTS, _NUM_SECOND_ROUND = 16, 3


class Tune(Protocol):
    """Evaluates arms on so many validation prompts, on all without a number."""

    def __call__(self, arms: Mapping[str, Arm], *, num_prompts: int | None = None) -> dict[str, Any]: ...


@dataclass(slots=True, frozen=True)
class Choice:
    """An instruction and what it was chosen by, as plain data."""

    instruction: Instruction
    rounds: list[list[dict[str, Any]]]

    def told(self) -> dict[str, Any]:
        return {**asdict(self.instruction), "rounds": self.rounds}


def best_instruction(texts: Sequence[str], subject: Subject, tune: Tune, *, has_system_role: bool) -> Choice:
    """The one of highest mean reward. `has_system_role` is of chats: before a plain text there is one place alone."""
    places: tuple[Place, ...] = ("system", "user") if has_system_role else ("user",)
    first = _rewards([Instruction(text, places[0]) for text in texts], subject, tune, _NUM_FIRST_PROMPTS)
    kept = sorted(first, key=lambda instruction: -first[instruction])[:_NUM_SECOND_ROUND]
    second = _rewards(
        [Instruction(instruction.text, place) for instruction in kept for place in places], subject, tune, None
    )
    best = max(second, key=lambda instruction: second[instruction])
    return Choice(best, [_told(first), _told(second)])


def _rewards(
    instructions: Sequence[Instruction], subject: Subject, tune: Tune, num_prompts: int | None
) -> dict[Instruction, float]:
    arms = {f"prompting {number}": subject.factory.prompting(one) for number, one in enumerate(instructions)}
    # The first arm is what others are measured against.
    figures = tune({"base": subject.factory.base(), **arms}, num_prompts=num_prompts)
    return {one: figures[name]["reward"]["mean"] for one, name in zip(instructions, arms, strict=True)}


def _told(rewards: Mapping[Instruction, float]) -> list[dict[str, Any]]:
    return [{**asdict(instruction), "reward": round(reward, 4)} for instruction, reward in rewards.items()]
