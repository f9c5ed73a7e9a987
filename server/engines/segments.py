"""Which part of a response each token belongs to: reasoning, the answer, or a call of a tool.

A model marks its parts by texts (`OutputFormat`), which are found by its chat template or named by a setting. Where a
mark is a token of the vocabulary, that token alone counts, so that a text about `<think>` is no mark; elsewhere a mark
may span tokens. Reasoning comes once, and where its marks are plain text only at the beginning of a response. What the
prompt holds of the response's turn (`Opening`) says how it begins; nothing else of a prompt is looked at, so that no
message can pass for a part of the response. Knows nothing of engines or HTTP. Enter at `SegmentTracker`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from server.control.state import Segment
from server.types import Opening, TokenText

__all__ = ["FORMATS", "Markup", "OutputFormat", "Segment", "SegmentTracker", "Span"]

AUTO, NONE = "auto", "none"
Piece = tuple[Segment, str]
"""Text of a response, without marks, and the part that it belongs to."""
_FIRST_SYMBOL = 0xD800
"""A token that is a mark, or in one, stands for a lone surrogate, which no decoded text holds."""


@dataclass(slots=True, frozen=True)
class Span:
    """A part that begins and ends by any of these marks. A special token stands in them under its name."""

    segment: Segment
    begins: tuple[str, ...]
    ends: tuple[str, ...]


@dataclass(slots=True, frozen=True)
class OutputFormat:
    """How a model marks the parts of what it writes; what is outside all spans is the answer."""

    name: str
    spans: tuple[Span, ...]

    @classmethod
    def reasoning(cls, name: str, begins: tuple[str, ...], ends: tuple[str, ...]) -> OutputFormat:
        return cls(name, (Span(Segment.REASONING, begins, ends),))

    @classmethod
    def of(cls, tokenizer: Any, setting: str) -> OutputFormat | None:
        """The one that a setting names; with `auto` what the tokenizer says, None where its chats mark nothing."""
        if setting == NONE:
            return None
        if setting != AUTO:
            return FORMATS[setting]
        return _told(getattr(tokenizer, "response_template", None)) or _in_template(tokenizer)

    def opening(self, turn: str, *, is_begun: bool) -> Opening:
        """How a response begins behind this text, which its turn has already; `is_begun` if some of it is said."""
        begins, ends = (
            max((turn.rfind(mark) for span in self.spans_of(Segment.REASONING) for mark in marks_of(span)), default=-1)
            for marks_of in (lambda span: span.begins, lambda span: span.ends)
        )
        if begins > ends:
            return Opening.REASONING
        return Opening.ANSWER if ends >= 0 or is_begun else Opening.EITHER

    def spans_of(self, segment: Segment) -> Iterator[Span]:
        return (span for span in self.spans if span.segment is segment)


FORMATS: Mapping[str, OutputFormat] = {
    known.name: known
    for known in (
        OutputFormat.reasoning("think", ("<think>",), ("</think>",)),
        OutputFormat.reasoning("mistral", ("[THINK]",), ("[/THINK]",)),
        OutputFormat.reasoning("gemma", ("<|channel>thought\n",), ("<channel|>",)),
        OutputFormat.reasoning(
            "granite",
            ("Here is my thought process:", "Here's my thought process:"),
            ("Here is my response:", "Here's my response:"),
        ),
        OutputFormat.reasoning("cohere", ("<|START_THINKING|>",), ("<|END_THINKING|>",)),
        OutputFormat.reasoning("seed", ("<seed:think>",), ("</seed:think>",)),
        OutputFormat.reasoning("exaone", ("<thought>",), ("</thought>",)),
        OutputFormat.reasoning("kimi", ("◁think▷",), ("◁/think▷",)),
    )
}


class AddedTokens(Protocol):
    """What has to be known of a vocabulary."""

    def added_token(self, text: str) -> int | None:
        """The token that was added to the vocabulary under this text."""
        ...

    def special_tokens(self) -> Mapping[int, str]:
        """The names of the tokens that never become text."""
        ...


class OpenText(Protocol):
    """A text in progress."""

    def flush(self) -> str:
        """What is open of it, which ends so."""
        ...


class Markup:
    """A format in the terms of a vocabulary; without one, every mark is plain text."""

    def __init__(self, output_format: OutputFormat, vocabulary: AddedTokens | None = None) -> None:
        self.symbols: dict[int, str] = {}
        """Token id -> what it stands for in marks."""
        self.texts: dict[str, str] = {}
        """What a symbol's token is in a text that it does not mark: nothing if it is special."""
        self._vocabulary = vocabulary
        self.spans = [
            Span(span.segment, self._patterns(span.begins), self._patterns(span.ends)) for span in output_format.spans
        ]

    @property
    def reasoning_tokens(self) -> frozenset[int]:
        """Tokens that begin reasoning; none where a mark at its beginning or end is not a single token."""
        by_symbol = {symbol: token_id for token_id, symbol in self.symbols.items()}
        spans = [span for span in self.spans if span.segment is Segment.REASONING]
        if not all(mark in by_symbol for span in spans for mark in (*span.begins, *span.ends)):
            return frozenset()
        return frozenset(by_symbol[mark] for span in spans for mark in span.begins)

    def visible(self, text: str) -> str:
        return "".join(self.texts.get(char, char) for char in text) if self.texts else text

    def _patterns(self, marks: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(self._pattern, marks))

    def _pattern(self, mark: str) -> str:
        if self._vocabulary is None:
            return mark
        special = self._vocabulary.special_tokens()
        whole = self._vocabulary.added_token(mark)
        if whole is not None:
            return self._symbol(whole, "" if whole in special else mark)
        for token_id, name in sorted(special.items(), key=lambda item: -len(item[1])):
            if name and name in mark:
                mark = mark.replace(name, self._symbol(token_id, ""))
        return mark

    def _symbol(self, token_id: int, text: str) -> str:
        symbol = self.symbols.setdefault(token_id, chr(_FIRST_SYMBOL + len(self.symbols)))
        self.texts[symbol] = text
        return symbol


class SegmentTracker:
    """Follows one response, token by token."""

    def __init__(self, markup: Markup, opening: Opening) -> None:
        self._markup = markup
        self._span: Span | None = None
        self._may_reason = opening is Opening.EITHER
        self._is_blank = opening is not Opening.ANSWER
        """Whether nothing but whitespace has come, which is held until something else has."""
        self._held = ""
        self.last = Segment.ANSWER
        """The part of the token that was added last; marks belong to what they mark."""
        if opening is Opening.REASONING:
            self._span = next(span for span in markup.spans if span.segment is Segment.REASONING)

    @property
    def next(self) -> Segment | None:
        """The part that the next token belongs to; None while it may still begin reasoning or the answer."""
        if self._may_reason and self._is_blank:
            return None
        return Segment.ANSWER if self._span is None else self._span.segment

    def add(self, token_id: int, text: str) -> list[Piece]:
        """Text that belongs to its part for good, of this token and of those before; `text` is what the token adds."""
        before = self._segment
        symbol = self._markup.symbols.get(token_id)
        if symbol is not None:
            text = text.removesuffix(self._markup.texts[symbol]) + symbol
        self._held += text
        pieces = self._settled()
        self.last = self._segment if before is Segment.ANSWER else before
        return pieces

    def add_token(self, token_id: int, token: TokenText, text: OpenText) -> list[Piece]:
        """Text that belongs to its part for good, as from `add`, of a token as the response's text has it. A character
        that is open ends with its part."""
        is_boundary = token.is_special and token_id in self._markup.symbols
        return self.add(token_id, text.flush() if is_boundary else token.text)

    def flush(self, text: str = "") -> list[Piece]:
        """The rest, and a text behind it, when nothing more comes."""
        self._held += text
        return [*self._settled(), *self._release(len(self._held))]

    def copy(self) -> SegmentTracker:
        """Another that goes on from here by itself."""
        return copy.copy(self)

    @property
    def _segment(self) -> Segment:
        return Segment.ANSWER if self._span is None else self._span.segment

    def _settled(self) -> list[Piece]:
        pieces: list[Piece] = []
        while (found := self._next_mark()) is not None:
            start, end, span = found
            rest = self._held[end:]
            begins_reasoning = span is not None and span.segment is Segment.REASONING
            # Whitespace before the reasoning belongs to nothing.
            if not (begins_reasoning and self._is_blank and not self._held[:start].strip()):
                pieces += self._release(start)
            self._held, self._span, self._is_blank = rest, span, False
            self._may_reason = self._may_reason and not begins_reasoning
        return pieces + self._release(self._safe_length())

    def _next_mark(self) -> tuple[int, int, Span | None] | None:
        """Where the first mark in the held text begins and ends, of those longest, and what span it leads into."""
        found: list[tuple[int, int, Span | None]] = []
        for mark, span in self._marks():
            start = self._held.find(mark)
            if start >= 0 and (start == 0 or not self._is_first(mark, span) or self._held[:start].isspace()):
                found.append((start, start + len(mark), span))
        return min(found, key=lambda place: (place[0], -place[1]), default=None)

    def _marks(self) -> Iterator[tuple[str, Span | None]]:
        """What may come now, with what it leads into."""
        if self._span is not None:
            yield from ((mark, None) for mark in self._span.ends)
            if self._is_blank:
                # The model may begin by itself what the prompt has begun.
                yield from ((mark, self._span) for mark in self._span.begins)
            return
        for span in self._markup.spans:
            for mark in span.begins:
                if span.segment is not Segment.REASONING or (
                    self._may_reason and (self._is_blank or not self._is_first(mark, span))
                ):
                    yield mark, span

    def _is_first(self, mark: str, span: Span | None) -> bool:
        """Whether a mark counts at the beginning of a response alone."""
        is_text = not any(symbol in mark for symbol in self._markup.texts)
        return is_text and span is not None and span.segment is Segment.REASONING

    def _safe_length(self) -> int:
        """How much of the held text no mark that comes later can reach into."""
        marks = list(self._marks())
        if self._is_blank:
            said = self._held.lstrip()
            if not said or any(mark.startswith(said) for mark, _ in marks):
                return 0
        held = self._held
        open_marks = [mark for mark, span in marks if not self._is_first(mark, span)]
        longest = min(len(held), max(map(len, open_marks), default=1) - 1)
        sizes = (size for size in range(longest, 0, -1) if any(mark.startswith(held[-size:]) for mark in open_marks))
        return len(held) - next(sizes, 0)

    def _release(self, length: int) -> list[Piece]:
        text, self._held = self._markup.visible(self._held[:length]), self._held[length:]
        if not text:
            return []
        self._is_blank = self._is_blank and text.isspace()
        return [(self._segment, text)]


def _in_template(tokenizer: Any) -> OutputFormat | None:
    """The format whose marks the chat template writes or reads."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    template = tokenizer.get_chat_template()
    return next((known for known in FORMATS.values() if any(mark in template for mark in _marks_of(known))), None)


def _marks_of(known: OutputFormat) -> Iterator[str]:
    for span in known.spans:
        yield from (*span.begins, *span.ends)


def _told(response_template: Any) -> OutputFormat | None:
    """The marks that transformers' templates for responses name; those that are patterns are left to others."""
    fields = response_template.get("fields") if isinstance(response_template, dict) else None
    for name in ("reasoning_content", "reasoning", "thinking"):
        field = fields.get(name) if isinstance(fields, dict) else None
        marks = [_literals(field.get(key)) for key in ("open", "close")] if isinstance(field, dict) else []
        if marks and all(marks):
            return OutputFormat.reasoning("response_template", marks[0], marks[1])
    return None


def _literals(marks: Any) -> tuple[str, ...]:
    listed = [marks] if isinstance(marks, str) else marks
    is_texts = isinstance(listed, list) and all(isinstance(mark, str) and mark.strip() for mark in listed)
    # Models leave out the whitespace around marks at times.
    return tuple(mark.strip() for mark in listed) if is_texts else ()
