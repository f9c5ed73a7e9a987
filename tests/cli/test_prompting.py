"""How prompting's instruction is chosen, on instructions whose rewards are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.cli.arms import Instruction
from server.cli.methods import Subject
from server.cli.prompting import Choice, best_instruction
from value_models.evaluation import Arm
from value_models.prompt_sets import load_instructions
from value_models.rewards import REWARDS

TEXTS = [f"Be kind {number}." for number in range(6)]
"""The later the better, in the system role by a half."""


class FakeFactory:
    """Arms that say what was asked for."""

    def base(self) -> Arm:
        return Arm({"reward": 0.0}, lambda *_: [])

    def prompting(self, instruction: Instruction) -> Arm:
        reward = TEXTS.index(instruction.text) + 0.5 * (instruction.place == "system")
        return Arm({"reward": reward}, lambda *_: [])


class Rounds:
    """How many arms were measured on how many prompts."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int | None]] = []

    def __call__(self, arms: Mapping[str, Arm], *, num_prompts: int | None = None) -> dict[str, Any]:
        self.sizes.append((len(arms) - 1, num_prompts))
        return {name: {"reward": {"mean": arm.spec["reward"]}} for name, arm in arms.items()}


def choose(*, has_system_role: bool) -> tuple[Choice, Rounds]:
    factory: Any = FakeFactory()
    rounds = Rounds()
    subject = Subject(factory, "kind", 0.12, 0.3, None)
    return best_instruction(TEXTS, subject, rounds, has_system_role=has_system_role), rounds


def test_the_instruction_and_place_of_highest_reward_are_taken_after_two_rounds() -> None:
    choice, rounds = choose(has_system_role=True)
    assert choice.instruction == Instruction("Be kind 5.", "system")
    assert rounds.sizes == [(6, 16), (6, None)]
    assert choice.told()["rounds"][1][0] == {"text": "Be kind 5.", "place": "system", "reward": 5.5}


def test_before_a_plain_text_there_is_one_place() -> None:
    choice, rounds = choose(has_system_role=False)
    assert choice.instruction == Instruction("Be kind 5.", "user")
    assert rounds.sizes == [(6, 16), (3, None)]


def test_every_built_in_reward_has_twenty_different_instructions() -> None:
    instructions = load_instructions()
    assert instructions.keys() == REWARDS.keys()
    assert {len(set(texts)) for texts in instructions.values()} == {20}
