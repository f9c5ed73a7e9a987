"""What each token of a tokenizer is on its own: its bytes, which join to a text's as characters do not.

A byte-level token is the bytes that its letters stand for, and a byte-fallback token (`<0x0A>`) is that byte. Any other
is what the tokenizer's decoder adds for it behind the token before, so that the rules of SentencePiece, WordPiece and
older vocabularies for spaces are the decoder's own. A special token is its name. Knows nothing of texts in progress,
which `Detokenizer` makes of this. Enter at `Vocabulary`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """Of one tokenizer, which must not change any more. From any thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token_id: token.content for token_id, token in added.items() if token.special}
        self._added = {token.content: token_id for token_id, token in added.items()}
        kinds = set(_decoder_kinds(tokenizer.decoder))
        self._is_byte_level = kinds == {"ByteLevel"}
        self._has_byte_tokens = "ByteFallback" in kinds
        self._letters = _bytes_of_letters() if self._is_byte_level else {}
        self._known: dict[int, bytes] = {}

    def is_special(self, token_id: int) -> bool:
        """Whether it never becomes text."""
        return token_id in self._special

    def special_tokens(self) -> Mapping[int, str]:
        """Their names."""
        return self._special

    def added_token(self, text: str) -> int | None:
        """The token that was added to the vocabulary under this text, special or not."""
        return self._added.get(text)

    def last_of_text(self, token_ids: Iterable[int]) -> int | None:
        """The first of them that is not special; None where all are."""
        return next((token_id for token_id in token_ids if token_id not in self._special), None)

    def token_bytes(self, token_id: int, previous: int | None) -> bytes:
        """The token's own bytes behind another one of a text, or at its beginning; none where there is no such token.

        `previous` is the last token that is not special.
        """
        known = self._known.get(token_id)
        if known is None:
            known = self._alone(token_id)
            if known is None:
                return self._behind(token_id, previous)
            self._known[token_id] = known
        if known == b" " and previous is None and not self._is_byte_level:
            # Decoders leave out a space at the beginning of a text, whatever token it comes by.
            return self._behind(token_id, previous)
        return known

    def _alone(self, token_id: int) -> bytes | None:
        """Of a token whose bytes are always the same; None for one that the decoder has to be asked about."""
        if token_id in self._special:
            return self._special[token_id].encode()
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            if all(letter in self._letters for letter in token):
                return bytes(self._letters[letter] for letter in token)
            return token.encode()
        if self._has_byte_tokens and (match := _BYTE.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return None

    def _behind(self, token_id: int, previous: int | None) -> bytes:
        before = [] if previous is None else [previous]
        start = len(self._tokenizer.decode(before)) if before else 0
        return self._tokenizer.decode([*before, token_id])[start:].encode()


def words_of_tokens(vocabulary: Vocabulary, size: int) -> dict[int, str]:
    """The word of each of the first `size` tokens that stands for a whole one or its beginning behind a space."""
    special = vocabulary.special_tokens()
    before = next((token_id for token_id in range(size) if token_id not in special), None)
    words: dict[int, str] = {}
    for token_id in range(size):
        if token_id not in special:
            text = vocabulary.token_bytes(token_id, before).decode(errors="replace")
            if text.startswith(" ") and text[1:].isalpha():
                words[token_id] = text[1:]
    return words


def _decoder_kinds(decoder: Any) -> Iterator[str]:
    """The names of a decoder's steps; a tokenizer without one joins its tokens by spaces."""
    left = [] if decoder is None else [json.loads(decoder.__getstate__())]
    while left:
        step = left.pop()
        if step["type"] == "Sequence":
            left += step["decoders"]
        else:
            yield step["type"]


def _bytes_of_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones are themselves, and the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
