"""Text to token ids and back, as every engine with a tokenizer of transformers does it.

Knows nothing of models. Enter at `Tokenization`.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from server.errors import InvalidRequestError


class Tokenization(ABC):
    """That part of an `Engine`; its methods may be called from any thread."""

    def __init__(self) -> None:
        # A call may change the tokenizer's truncation and padding, so one at a time.
        self._encoding = threading.Lock()

    @property
    @abstractmethod
    def _tokenizer(self) -> Any:
        """Raises EngineStoppedError before the engine has been started."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        with self._encoding:
            return self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]

    def encode_chat(self, messages: Sequence[Mapping[str, str]], *, continue_final_message: bool = False) -> list[int]:
        with self._encoding:
            return encode_chat(self._tokenizer, messages, continue_final_message=continue_final_message)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids))

    def token_text(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id])


def encode_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], *, continue_final_message: bool = False
) -> list[int]:
    """Token ids in the model's own template (transformers renders it in a sandbox). Raises InvalidRequestError."""
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidRequestError("messages: this model has no chat template; use /v1/completions", param="messages")
    try:
        encoded = tokenizer.apply_chat_template(
            list(messages),
            add_generation_prompt=not continue_final_message,
            continue_final_message=continue_final_message,
            return_dict=True,
        )
    except Exception as error:
        raise InvalidRequestError(
            f"messages: the model's chat template refuses them ({error})", param="messages"
        ) from error
    return list(encoded["input_ids"])
