"""Text to token ids and back, as every engine with a tokenizer of transformers does it.

`Tokenization` is what an engine offers of it. `Detokenizer` gives a choice's text as its tokens come, and never a part
of a character: bytes wait until they complete one. `StopMatcher` holds back text that may be the beginning of a stop
string. None of them knows of models, sequences or engines.
"""

from __future__ import annotations

import copy
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from server.engines.chat_template import encode_chat
from server.types import ChatRendering

_CONTEXT_TOKENS = 6
_REPLACEMENT = "\ufffd"


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

    def encode_chat(self, messages: Sequence[Mapping[str, str]], rendering: ChatRendering | None = None) -> list[int]:
        with self._encoding:
            return encode_chat(self._tokenizer, messages, rendering)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids))

    def token_text(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id])


class TextOfTokens(Protocol):
    """A choice's text from its tokens, one after the other."""

    def add(self, token_id: int) -> str:
        """Text that the token completes."""
        ...

    def copy(self) -> TextOfTokens:
        """Another that goes on from here by itself."""
        ...


class Detokenizer:
    """Incremental decoding of one choice; the prompt's last tokens give the first new one its leading space."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        context = list(prompt_token_ids[-_CONTEXT_TOKENS:])
        # A stream whose context ends in an open character would give the context out with the first new text.
        while context and tokenizer.decode(context, skip_special_tokens=True).endswith(_REPLACEMENT):
            context.pop()
        self._stream = DecodeStream(ids=context, skip_special_tokens=True)

    def add(self, token_id: int) -> str:
        """Text that the token completes; empty while a character is still open."""
        try:
            return self._stream.step(self._tokenizer, token_id) or ""
        except Exception:
            # Byte-fallback decoders can rewrite text that is out already, which a stream refuses: begin a new one.
            self._stream = DecodeStream(skip_special_tokens=True)
            return self._stream.step(self._tokenizer, token_id) or ""

    def copy(self) -> Detokenizer:
        """Another that goes on from here by itself."""
        other = copy.copy(self)
        other._stream = copy.copy(self._stream)
        return other


class StopMatcher:
    """Passes text through until a stop string appears; the string itself and what follows are dropped."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.has_stopped = False

    def add(self, text: str) -> str:
        """Text that is safe to give out. Sets `has_stopped` at the match that completes first, however text was cut."""
        if not self._stop:
            return text
        self._held += text
        matches = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if matches:
            self.has_stopped = True
            _, start = min(matches)
            return self._release(start, drop_rest=True)
        return self._release(len(self._held) - self._open_suffix())

    def flush(self) -> str:
        """What is still held, at the end of the text."""
        return self._release(len(self._held))

    def _release(self, length: int, *, drop_rest: bool = False) -> str:
        out, rest = self._held[:length], self._held[length:]
        self._held = "" if drop_rest else rest
        return out

    def _open_suffix(self) -> int:
        """Length of the longest end of the held text that begins some stop string."""
        longest = min(len(self._held), max(map(len, self._stop)) - 1)
        for length in range(longest, 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0
