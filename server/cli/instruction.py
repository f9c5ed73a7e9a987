"""What `recontrol train --instruction` does: from a system message, and its opposite if there is one, to a head.

Enter at `InstructionCommand`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from server.cli.command import ModelCommand
from server.cli.program import command_line
from server.control.registry import HeadRegistry
from server.engines.embedded.instructed import EngineInstructedSource
from value_models.cards import distilled_card
from value_models.distillation import (
    MIN_PROMPTS,
    DistilSettings,
    chat_prompts,
    check_instructions,
    distil_head,
    read_texts,
)
from value_models.prompt_sets import RolloutPrompt
from value_models.store import save_head, shipped_heads_folder
from value_models.training import TrainSettings

_DEFAULTS = DistilSettings()
_ONLY_WITH_AN_INSTRUCTION = ("contrast", "instruction_prompts", "instruction_tokens")
_SHARED_SETTINGS = {"damping", "ridge", "seed"}
"""Of TrainSettings, what an instruction takes too; of `damping` and `ridge` it takes the best where none is given."""


class InstructionCommand(ModelCommand):
    """A command that may distil an instruction."""

    instruction: str | None = Field(None, description="a system message to make a head of, in place of a reward")
    contrast: str | None = Field(None, description="of --instruction: the system message to lead away from")
    instruction_prompts: Annotated[int, Field(ge=MIN_PROMPTS)] = Field(
        _DEFAULTS.max_prompts, description="of --instruction: chat prompts to read it at, the first of the file"
    )
    instruction_tokens: Annotated[int, Field(ge=1)] = Field(
        _DEFAULTS.max_tokens, description="of --instruction: new tokens of a response"
    )

    @model_validator(mode="after")
    def _with_an_instruction(self) -> Self:
        if self.instruction is None:
            self.refuse_without("--instruction", _ONLY_WITH_AN_INSTRUCTION)
            return self
        check_instructions(self.instruction, self.contrast)
        others = {"reward", "rollouts", "pairs", "texts", "source_weights"}
        unused = (others | TrainSettings.model_fields.keys()) - _SHARED_SETTINGS
        if given := sorted(unused & self.model_fields_set):
            raise ValueError(f"{given[0]}: an instruction does not use it; leave it out")
        return self

    def distil(
        self, name: str, description: str, prompts: Sequence[RolloutPrompt], out: Path | None, settings: TrainSettings
    ) -> None:
        """Make the head and write it with its card.

        Raises InstructionError, RolloutError, ModelLoadError, ConfigurationError.
        """
        assert self.instruction is not None
        distil_settings = DistilSettings(
            max_prompts=self.instruction_prompts,
            max_tokens=self.instruction_tokens,
            damping=settings.damping if "damping" in self.model_fields_set else None,
            ridge=settings.ridge if "ridge" in self.model_fields_set else None,
            seed=settings.seed,
        )
        # Before the model, which takes long to load.
        chat_prompts(prompts, distil_settings)
        loaded = self.load()
        source = EngineInstructedSource(loaded, self.core(loaded, HeadRegistry({})))
        texts = read_texts(source, prompts, self.instruction, self.contrast, distil_settings)
        distilled = distil_head(texts, source.output, distil_settings)
        folder = (out or shipped_heads_folder(source.base_model["name"])) / name
        card = distilled_card(
            name,
            description,
            source.base_model,
            texts,
            distil_settings,
            distilled,
            instruction=self.instruction,
            contrast=self.contrast,
            command=command_line(),
        )
        save_head(folder, distilled.head, card)
        print(f"{folder}: {_figures_text(distilled.distillation)}")


def _figures_text(figures: dict[str, dict[str, float]]) -> str:
    nearest, equal = figures["nearest"], figures["at_equal_kl"]
    return (
        f"on test prompts the instruction moves the model by {figures['bare']['to_instructed']:.3f} nats a token; the "
        f"head closes {nearest['share_closed']:.0%} of that for {nearest['paid']:.3f} nats, and leans "
        f"{equal['share_of_leaning']:.0%} as far at the instruction's own price"
    )
