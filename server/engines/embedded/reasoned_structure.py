"""Texts that hold a schema behind reasoning, which is free: which tokens may come before the schema begins.

Reasoning is told apart here by single tokens, since a token that ended it with text behind it would escape the schema.
Where a model marks reasoning otherwise, the schema holds from the first token, so that there is none. Knows nothing of
schemas. Enter at `held_to`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from server.engines.embedded.structure import SchemaMatcher, TokenMask
from server.engines.segments import Markup, Segment
from server.errors import InvalidRequestError
from server.types import GenerationRequest, Opening


@dataclass(slots=True, frozen=True)
class Openers:
    """What a model's reasoning is to a schema."""

    begins: frozenset[int]
    """Tokens that begin it; none where it could not be told apart by tokens alone."""
    text_ends: frozenset[int]

    @classmethod
    def of(cls, markup: Markup | None, text_ends: Collection[int]) -> Openers:
        begins = frozenset[int]() if markup is None else markup.reasoning_tokens
        return cls(begins, frozenset(text_ends))


def check_structure(request: GenerationRequest, markup: Markup | None) -> None:
    """Raises InvalidRequestError for a schema behind reasoning that cannot be told apart by tokens alone."""
    is_open = request.structure is not None and request.opening is Opening.REASONING
    if is_open and markup is not None and not markup.reasoning_tokens:
        field, what = (
            ("response_format", "no text can hold to it") if request.calls is None else ("tools", "no call is held")
        )
        raise InvalidRequestError(
            f"{field}: this model's marks of reasoning are no tokens, so {what} behind reasoning; turn reasoning off "
            "by chat_template_kwargs.enable_thinking",
            param=field,
        )


def held_to(matcher: SchemaMatcher, segment: Segment | None, openers: Openers) -> TokenMask:
    """What the next token of this part is held to."""
    if segment is Segment.REASONING:
        return _Reasoning(matcher.vocab_size, openers.text_ends)
    return matcher if segment is not None or not openers.begins else _Beginning(matcher, openers.begins)


@dataclass(slots=True, frozen=True)
class _Reasoning:
    """Anything but the end of the text: an answer has to come."""

    vocab_size: int
    text_ends: frozenset[int]

    def allowed(self) -> np.ndarray:
        return _with(np.ones(self.vocab_size, bool), self.text_ends, value=False)

    def check(self) -> None: ...

    def advance(self, token_id: int) -> None: ...


@dataclass(slots=True, frozen=True)
class _Beginning:
    """What the schema allows, or reasoning."""

    matcher: SchemaMatcher
    begins: frozenset[int]

    def allowed(self) -> np.ndarray:
        return _with(self.matcher.allowed().copy(), self.begins, value=True)

    def check(self) -> None:
        self.matcher.check()

    def advance(self, token_id: int) -> None:
        if token_id not in self.begins:
            self.matcher.advance(token_id)


def _with(allowed_V: np.ndarray, token_ids: Collection[int], *, value: bool) -> np.ndarray:
    allowed_V[[token_id for token_id in token_ids if token_id < len(allowed_V)]] = value
    return allowed_V
