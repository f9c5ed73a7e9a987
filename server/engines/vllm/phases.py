"""The parts of responses inside a vLLM worker, for control of one of them alone.

The worker follows each response as this program's other side does, by the tokens that vLLM has drawn. What is known is
kept for every number of tokens, so tokens that are thrown away and drawn again are no trouble. Knows no vLLM. Enter at
`PartsReader.start`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from server.control.params import ControlParams
from server.engines.segments import Markup, OutputFormat, SegmentTracker
from server.engines.text import Detokenizer
from server.engines.vocabulary import Vocabulary
from server.types import Opening


@dataclass(slots=True, frozen=True)
class PartsReader:
    """How a model's responses are told apart."""

    markup: Markup
    vocabulary: Vocabulary

    @classmethod
    def of(cls, tokenizer: Any, setting: str) -> Self | None:
        """None where chats mark no reasoning."""
        output_format = OutputFormat.of(tokenizer, setting)
        if output_format is None:
            return None
        vocabulary = Vocabulary(tokenizer.backend_tokenizer)
        return cls(Markup(output_format, vocabulary), vocabulary)

    def start(self, opening: Opening) -> FollowedParts:
        return FollowedParts([_Place(SegmentTracker(self.markup, opening), Detokenizer(self.vocabulary, ()), 0)])


@dataclass(slots=True, frozen=True)
class _Place:
    """What is known before the token of a place; neither object changes any more."""

    segments: SegmentTracker
    text: Detokenizer
    num_controlled: int
    """Tokens before it on which control acts."""


@dataclass(slots=True)
class FollowedParts:
    """One response so far."""

    places: list[_Place]

    def is_controlled(self, control: ControlParams, position: int) -> bool:
        """Whether control acts on the token of this place. Raises IndexError where one before it is not known."""
        return control.acts_on(self.places[position].segments.next)

    def num_controlled(self, position: int) -> int:
        return self.places[position].num_controlled

    def hear(self, control: ControlParams, position: int, token_id: int) -> None:
        """The token of this place has been drawn, perhaps in the stead of another."""
        before = self.places[position]
        segments, text = before.segments.copy(), before.text.copy()
        segments.add_token(token_id, text.add(token_id), text)
        del self.places[position + 1 :]
        self.places.append(_Place(segments, text, before.num_controlled + self.is_controlled(control, position)))
