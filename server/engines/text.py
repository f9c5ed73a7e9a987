"""Text to token ids and back, as every engine with a tokenizer of transformers does it.

`Tokenization` is what an engine offers of it. `Detokenizer` gives a choice's text as its tokens come, and never a part
of a character: bytes wait until they complete one, and what can complete none is U+FFFD. `StopMatcher` holds back text
that may be the beginning of a stop string. None of them knows of models, sequences or engines.
"""

from __future__ import annotations

import codecs
import contextlib
import copy
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from server.calls.formats import CallFormat
from server.engines.chat_template import encode_chat, template_of
from server.engines.instruction import encode_instructed
from server.engines.vocabulary import Vocabulary
from server.types import ChatRendering, TokenLogprob, TokenText

_LONG_CHARS = 2**14
_GAP = "\ud800"
"""Half a surrogate pair, which is in no text and in no stop string."""


class Tokenization(ABC):
    """That part of an `Engine`; its methods may be called from any thread."""

    def __init__(self) -> None:
        # A call may change the tokenizer's truncation and padding, so one at a time.
        self._encoding = threading.Lock()
        self._encoding_large = threading.Lock()
        self._copied: tuple[Any, Any] | None = None
        self._known: tuple[Any, Vocabulary] | None = None

    @property
    @abstractmethod
    def _tokenizer(self) -> Any:
        """Raises EngineStoppedError before the engine has been started."""

    @property
    @abstractmethod
    def _call_format(self) -> CallFormat | None:
        """How the model writes calls of tools."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        with self._reading(len(text)) as tokenizer:
            return tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], rendering: ChatRendering | None = None) -> list[int]:
        with self._reading(len(repr((messages, rendering)))) as tokenizer:
            return encode_chat(tokenizer, messages, rendering, self._call_format)

    def encode_instructed(
        self,
        text: str,
        prompt_token_ids: Sequence[int],
        messages: Sequence[Mapping[str, Any]] | None = None,
        rendering: ChatRendering | None = None,
    ) -> list[int]:
        with self._reading(len(text) + len(prompt_token_ids) + len(repr((messages, rendering)))) as tokenizer:
            return encode_instructed(tokenizer, text, prompt_token_ids, messages, rendering, self._call_format)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids))

    def texts_alone(self, token_ids: Sequence[int]) -> list[str]:
        # A long text has few different tokens, and asking for one takes ten times as long as looking it up.
        texts = {token_id: self._tokenizer.decode([token_id]) for token_id in set(token_ids)}
        return [texts[token_id] for token_id in token_ids]

    def token_texts(self, token_ids: Sequence[int]) -> list[TokenText]:
        text = Detokenizer(self._vocabulary, ())
        tokens = [text.add(token_id) for token_id in token_ids]
        if tokens and not tokens[-1].is_special:
            tokens[-1] = replace(tokens[-1], text=tokens[-1].text + text.flush())
        return tokens

    def tokenizer_info(self) -> dict[str, Any]:
        tokenizer = self._tokenizer
        names = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        return {
            "tokenizer_class": type(tokenizer).__name__,
            **names,
            "chat_template": template_of(tokenizer),
        }

    @contextlib.contextmanager
    def _reading(self, num_chars: int) -> Iterator[Any]:
        """The tokenizer, for one text at a time; long ones have one of their own, so that short ones never wait."""
        if num_chars <= _LONG_CHARS:
            with self._encoding:
                yield self._tokenizer
            return
        with self._encoding_large:
            tokenizer = self._tokenizer
            if self._copied is None or self._copied[0] is not tokenizer:
                with self._encoding:
                    self._copied = tokenizer, copy.deepcopy(tokenizer)
            yield self._copied[1]

    @property
    def _vocabulary(self) -> Vocabulary:
        tokenizer = self._tokenizer
        if self._known is None or self._known[0] is not tokenizer:
            self._known = tokenizer, Vocabulary(tokenizer.backend_tokenizer)
        return self._known[1]


class TextOfTokens(Protocol):
    """A choice's text from its tokens, one after the other."""

    def add(self, token_id: int) -> TokenText:
        """What the token is behind those that were added."""
        ...

    def peek(self, token_id: int) -> TokenText:
        """What the token would be there, without adding it; it completes no character."""
        ...

    def flush(self) -> str:
        """The end of a text: U+FFFD for a character that is still open."""
        ...

    def copy(self) -> TextOfTokens:
        """Another that goes on from here by itself."""
        ...


class Detokenizer:
    """Incremental decoding of one choice; behind a prompt with text, its first token keeps its leading space."""

    def __init__(self, vocabulary: Vocabulary, prompt_token_ids: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        self._previous = vocabulary.last_of_text(reversed(prompt_token_ids))
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> TokenText:
        token = self.peek(token_id)
        if token.is_special:
            return token
        self._previous = token_id
        return replace(token, text=self._decoder.decode(token.data))

    def peek(self, token_id: int) -> TokenText:
        data = self._vocabulary.token_bytes(token_id, self._previous)
        return TokenText("", data, self._vocabulary.is_special(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)

    def copy(self) -> Detokenizer:
        other = Detokenizer(self._vocabulary, ())
        other._previous = self._previous
        other._decoder.setstate(self._decoder.getstate())
        return other


def text_alone(data: bytes) -> str:
    """A token's text on its own; OpenAI's notation (`bytes:\\xf0\\x9f`) for bytes that are no text."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def with_texts(score: TokenLogprob, text: TextOfTokens) -> TokenLogprob:
    """The log-probabilities of the token that comes next, with texts; `as_chosen` tells what it completed."""
    own = text.peek(score.token_id).data
    top = [(other, text.peek(other.token_id).data) for other in score.top]
    return replace(
        score,
        text=text_alone(own),
        data=own,
        top=tuple(other._replace(text=text_alone(data), data=data) for other, data in top),
    )


def as_chosen(score: TokenLogprob, token: TokenText) -> TokenLogprob:
    """The log-probabilities with the token, wherever they name it, under the text that it completed, so that tokens
    join to the text."""
    top = tuple(other._replace(text=token.shown) if other.token_id == score.token_id else other for other in score.top)
    return replace(score, text=token.shown, data=token.data, num_chars=len(token.text), top=top)


def prompt_with_texts(
    scores: Sequence[TokenLogprob | None], prompt_token_ids: Sequence[int], vocabulary: Vocabulary
) -> tuple[TokenLogprob | None, ...]:
    """A prompt's log-probabilities, one for each of its tokens, with texts."""
    text = Detokenizer(vocabulary, ())
    described: list[TokenLogprob | None] = []
    for score, token_id in zip(scores, prompt_token_ids, strict=True):
        complete = None if score is None else with_texts(score, text)
        token = text.add(token_id)
        described.append(None if complete is None else as_chosen(complete, token))
    return tuple(described)


class StopMatcher:
    """Passes text through until a stop string appears; the string itself and what follows are dropped.

    A stop string is looked for in the text, and in the text with the names of special tokens, which never go out.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self._hidden: list[tuple[int, int]] = []
        """Where names of special tokens begin and end in the held text."""
        self.has_stopped = False

    def add(self, text: str, special: str = "") -> str:
        """Text that is safe to give out, before or without a special token's name.

        Sets `has_stopped` at the match that completes first, however text was cut.
        """
        if not self._stop:
            return text
        self._held += text
        if special:
            self._hidden.append((len(self._held), len(self._held) + len(special)))
            self._held += special
        matches = list(self._matches())
        if self._hidden:
            text, places = self._visible()
            found = [(at, at + len(stop)) for stop in self._stop if (at := text.find(stop)) >= 0]
            matches += [(places[end - 1] + 1, places[start]) for start, end in found]
        if matches:
            self.has_stopped = True
            _, start = min(matches)
            return self._release(start, drop_rest=True)
        if self._hidden:
            self._forget_names()
        return self._release(self._safe_length())

    def _forget_names(self) -> None:
        """Put one character that no text has in the place of names that no stop string can end behind any more: text
        before them may be held for as long as nothing visible comes."""
        open_from = len(self._held) - self._open_suffix(self._held)
        if not any(end <= open_from and end - start > 1 for start, end in self._hidden):
            return
        held, hidden, begin = "", [], 0
        for start, end in self._hidden:
            held += self._held[begin:start]
            begin = end
            if end > open_from:
                hidden.append((len(held), len(held) + end - start))
                held += self._held[start:end]
            elif not held.endswith(_GAP):
                hidden.append((len(held), len(held) + 1))
                held += _GAP
        self._held, self._hidden = held + self._held[begin:], hidden

    def flush(self) -> str:
        """What is still held, at the end of the text."""
        return self._release(len(self._held))

    def copy(self) -> StopMatcher:
        """Another that goes on from here by itself."""
        other = StopMatcher(self._stop)
        other._held, other._hidden, other.has_stopped = self._held, list(self._hidden), self.has_stopped
        return other

    def _matches(self) -> Iterator[tuple[int, int]]:
        """Where each stop string's first match in all that is held ends and begins; no name is matched in part."""
        for stop in self._stop:
            start = self._held.find(stop)
            while start >= 0:
                end = start + len(stop)
                if all((start <= a and b <= end) or b <= start or end <= a for a, b in self._hidden):
                    yield end, start
                    break
                start = self._held.find(stop, start + 1)

    def _visible(self) -> tuple[str, list[int]]:
        """The held text without special tokens, and where its characters are held."""
        places: list[int] = []
        begin = 0
        for start, end in [*self._hidden, (len(self._held), 0)]:
            places += range(begin, start)
            begin = end
        return "".join(self._held[i] for i in places), places

    def _safe_length(self) -> int:
        """How much of the held text can be in no stop string that comes later."""
        safe = len(self._held) - self._open_suffix(self._held)
        if self._hidden:
            visible, places = self._visible()
            open_length = self._open_suffix(visible)
            safe = min(safe, places[-open_length]) if open_length else safe
        return safe

    def _release(self, length: int, *, drop_rest: bool = False) -> str:
        out, rest = self._held[:length], self._held[length:]
        for start, end in reversed(self._hidden):
            out = out[:start] + out[end:]
        hidden = [(max(start - length, 0), end - length) for start, end in self._hidden if end > length]
        self._held, self._hidden = ("", []) if drop_rest else (rest, hidden)
        return out

    def _open_suffix(self, text: str) -> int:
        """Length of the longest end of a text that begins some stop string."""
        longest = min(len(text), max(map(len, self._stop)) - 1)
        for length in range(longest, 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0
