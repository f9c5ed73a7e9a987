"""What a job makes a head of. Plain data, checked. Enter at `Recipe`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from value_models.distillation import DistilSettings
    from value_models.given_texts import GivenTexts
    from value_models.prompt_sets import RolloutPrompt
    from value_models.scored_texts import ScoreSettings
    from value_models.training import TrainSettings


@dataclass(slots=True, frozen=True)
class FromTexts:
    """Pairs, or texts with scores, as `recontrol train --pairs` and `--texts` take them."""

    given: GivenTexts
    score: ScoreSettings
    train: TrainSettings

    @property
    def method(self) -> str:
        return self.given.kind

    @property
    def num_texts(self) -> int:
        return len(self.given.texts)


@dataclass(slots=True, frozen=True)
class FromInstruction:
    """A system message, and one to lead away from, as `recontrol train --instruction` takes them."""

    instruction: str
    contrast: str | None
    prompts: tuple[RolloutPrompt, ...]
    settings: DistilSettings

    @property
    def method(self) -> str:
        return "instruction"

    @property
    def num_texts(self) -> int:
        """A response after each of both sides."""
        return 2 * min(len(self.prompts), self.settings.max_prompts)


@dataclass(slots=True, frozen=True)
class Recipe:
    name: str
    description: str
    replaces: bool
    """Whether a head of that name may be there already."""
    source: FromTexts | FromInstruction
