"""Parts of a response: which token belongs to reasoning and which to the answer, however marks are cut into tokens."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from server.engines.segments import FORMATS, Markup, OutputFormat, Piece, Segment, SegmentTracker
from server.engines.text import Detokenizer
from server.engines.vocabulary import Vocabulary
from server.types import Opening
from tests.engines.tokenizers import byte_fallback, byte_level, sentencepiece_like

THINK = FORMATS["think"]
REASONING, ANSWER = Segment.REASONING, Segment.ANSWER
KINDS = {"byte-level": byte_level, "sentencepiece": sentencepiece_like, "byte fallback": byte_fallback}
MARKS = {"special": True, "added": False, "text": None}


def vocabulary(kind: str, marks: str = "text", output_format: OutputFormat = THINK) -> Vocabulary:
    tokenizer: Tokenizer = KINDS[kind]()
    if MARKS[marks] is not None:
        span = output_format.spans[0]
        tokenizer.add_tokens([AddedToken(mark, special=bool(MARKS[marks])) for mark in (*span.begins, *span.ends)])
    return Vocabulary(tokenizer)


def as_tokens(known: Vocabulary, *texts: str) -> list[int]:
    """A mark as its token where there is one, and anything else a byte a token."""
    ids: list[int] = []
    for text in texts:
        added = known.added_token(text)
        ids += [added] if added is not None else [byte_token(known, byte) for byte in text.encode()]
    return ids


def byte_token(known: Vocabulary, byte: int) -> int:
    return next(i for i in range(300) if not known.is_special(i) and known.token_bytes(i, 0) == bytes([byte]))


def told(known: Vocabulary, ids: list[int], opening: Opening, output_format: OutputFormat = THINK) -> list[Piece]:
    """Each part's text, one after the other."""
    tracker, text = SegmentTracker(Markup(output_format, known), opening), Detokenizer(known, [byte_token(known, 65)])
    pieces = [piece for token_id in ids for piece in tracker.add(token_id, text.add(token_id).text)]
    return joined([*pieces, *tracker.flush(text.flush())])


def joined(pieces: list[Piece]) -> list[Piece]:
    return [(part, "".join(text for _, text in run)) for part, run in groupby(pieces, key=lambda piece: piece[0])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("marks", ["special", "text"])
@settings(max_examples=30, deadline=None)
@given(reasoning=st.text("ab <\n/tè", min_size=1, max_size=12), answer=st.text("cd <\n>è", min_size=1, max_size=12))
def test_reasoning_and_answer_are_told_apart_wherever_the_tokens_are_cut(
    kind: str, marks: str, reasoning: str, answer: str
) -> None:
    known = vocabulary(kind, marks)
    opened = as_tokens(known, reasoning, "</think>", answer)
    assert told(known, opened, Opening.REASONING) == [(REASONING, reasoning), (ANSWER, answer)]
    whole = as_tokens(known, "\n", "<think>") + opened
    assert told(known, whole, Opening.EITHER) == [(REASONING, reasoning), (ANSWER, answer)]
