"""The embedded engine as a source of instructed texts: the same tokens read after an instruction and without it.

Implements `value_models.distillation.InstructedSource`. An instruction is the system message of a chat; without one the
template's own default stands, as it does for requests. Enter at `EngineInstructedSource`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from server.engines.chat_template import encode_chat
from server.engines.embedded.rollouts import EngineRolloutSource
from server.errors import InvalidRequestError
from value_models.distillation import InstructedText, OutputLayer
from value_models.errors import InstructionError
from value_models.prompt_sets import RolloutPrompt
from value_models.rollouts import RolloutSettings


class EngineInstructedSource(EngineRolloutSource):
    """Samples after instructions, and reads each text after all of them."""

    @property
    def output(self) -> OutputLayer:
        return self.core.lm_head

    def encode(self, prompt: RolloutPrompt, instruction: str | None = None) -> list[int]:
        """A chat's tokens, with the instruction as its system message, before that of its own if it has one.

        Raises InstructionError.
        """
        try:
            return encode_chat(self.loaded.tokenizer, self.messages(prompt, instruction))
        except InvalidRequestError as error:
            raise InstructionError(f"instruction: {error}") from error

    def messages(self, prompt: RolloutPrompt, instruction: str | None) -> list[dict[str, str]]:
        turns = prompt.turns()
        if instruction is not None:
            own = f"\n\n{turns.pop(0)['content']}" if turns[0]["role"] == "system" else ""
            turns.insert(0, {"role": "system", "content": f"{instruction}{own}"})
        return turns

    def texts(
        self, prompts: Sequence[RolloutPrompt], instruction: str, contrast: str | None, settings: RolloutSettings
    ) -> Iterator[InstructedText]:
        """A response to each prompt after the instruction, and one after the contrast.

        Raises InstructionError where the model has no place for an instruction, RolloutError for a prompt that does
        not fit, RuntimeError when the engine fails.
        """
        self.check_is_read(prompts[0], instruction)
        by_id = {prompt.id: prompt for prompt in prompts}
        for side in (instruction, contrast):
            for sequence, _, _ in self._run(prompts, settings, control=None, instruction=side):
                prompt, token_ids = by_id[sequence.request.request_id], sequence.token_ids
                states = {side: torch.stack(sequence.states or [])}
                for other in {None, instruction, contrast} - {side}:
                    states[other] = self._states(self.encode(prompt, other), token_ids)
                yield InstructedText(
                    prompt_id=prompt.id,
                    token_ids_T=torch.tensor(token_ids),
                    bare_TD=states[None].cpu(),
                    instructed_TD=states[instruction].cpu(),
                    contrasted_TD=states[contrast].cpu(),
                )

    def check_is_read(self, prompt: RolloutPrompt, instruction: str) -> None:
        """Some templates pass over system messages without a word."""
        if self.encode(prompt, instruction) == self.encode(prompt, f"{instruction} {instruction}"):
            raise InstructionError(
                "instruction: this model's chat template leaves system messages out, so there is no place for one"
            )
