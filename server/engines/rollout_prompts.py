"""A prompt of a prompt file as an engine reads it. Enter at `encode_prompt`."""

from __future__ import annotations

from typing import Any

from server.engines.chat_template import encode_chat
from value_models.prompt_sets import RolloutPrompt


def encode_prompt(tokenizer: Any, prompt: RolloutPrompt, instruction: str | None = None) -> list[int]:
    """A prompt's tokens, with an instruction put before it, or before a conversation's last message.

    Raises InvalidRequestError for a conversation that the model's chat template refuses.
    """
    if prompt.format == "chat":
        return encode_chat(tokenizer, prompt.turns(instruction))
    text = prompt.text if instruction is None else f"{instruction}\n\n{prompt.text}"
    return list(tokenizer(text)["input_ids"])
