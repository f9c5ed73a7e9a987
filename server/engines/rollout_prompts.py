"""A prompt of a prompt file as an engine is asked for responses to it. Enter at `rollout_request`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from server.control.params import ControlParams
from server.engines.chat_template import encode_chat
from server.types import GenerationRequest, SamplingParams
from value_models.prompt_sets import RolloutPrompt
from value_models.rollouts import RolloutSettings


def encode_prompt(tokenizer: Any, prompt: RolloutPrompt, instruction: str | None = None) -> list[int]:
    """A prompt's tokens, with an instruction put before it, or before a conversation's last message.

    Raises InvalidRequestError for a conversation that the model's chat template refuses.
    """
    if prompt.format == "chat":
        return encode_chat(tokenizer, prompt.turns(instruction))
    text = prompt.text if instruction is None else f"{instruction}\n\n{prompt.text}"
    return list(tokenizer(text)["input_ids"])


def rollout_request(
    prompt: RolloutPrompt,
    token_ids: Sequence[int],
    settings: RolloutSettings,
    *,
    control: ControlParams | None = None,
) -> GenerationRequest:
    """All responses to a prompt, of these tokens; its id is the request's."""
    return GenerationRequest(
        request_id=prompt.id,
        prompt_token_ids=tuple(token_ids),
        sampling=SamplingParams(
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=response_seed(settings.seed, prompt.id),
        ),
        control=control,
        num_choices=settings.num_samples,
    )


def response_seed(seed: int, prompt_id: str) -> int:
    """Of the random streams of a prompt's responses."""
    digest = hashlib.sha256(f"{seed}:{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
