"""Parts of a response: which token belongs to reasoning and which to the answer, however marks are cut into tokens."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from server.engines.base import NullObserver
from server.engines.choice import Choice
from server.engines.segments import FORMATS, Markup, OutputFormat, Piece, Segment, SegmentTracker
from server.engines.text import Detokenizer
from server.engines.vocabulary import Vocabulary
from server.types import GenerationRequest, Opening, SamplingParams
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


@pytest.mark.parametrize("kind", KINDS)
def test_the_part_of_the_next_token_changes_with_the_mark_that_ends_one(kind: str) -> None:
    for marks, sizes in (("special", 1), ("text", len("</think>"))):
        known = vocabulary(kind, marks)
        tracker, text = SegmentTracker(Markup(THINK, known), Opening.REASONING), Detokenizer(known, ())
        parts = [(tracker.next, tracker.last)]
        for token_id in as_tokens(known, "ab", "</think>", "cd"):
            tracker.add(token_id, text.add(token_id).text)
            parts.append((tracker.next, tracker.last))
        assert [part for part, _ in parts] == [REASONING] * (2 + sizes) + [ANSWER] * 3
        assert [part for _, part in parts[1:]] == [REASONING] * (2 + sizes) + [ANSWER] * 2


def test_a_response_may_begin_either_until_it_has_said_something() -> None:
    known = vocabulary("byte-level", output_format=FORMATS["exaone"])
    tracker = SegmentTracker(Markup(FORMATS["exaone"], known), Opening.EITHER)
    seen = [tracker.next]
    for letter in "\n <tho":
        assert tracker.add(byte_token(known, ord(letter)), letter) == []
        seen.append(tracker.next)
    assert seen == [None] * 7
    assert tracker.copy().add(byte_token(known, ord("x")), "x") == [(ANSWER, "\n <thox")]
    assert joined(tracker.copy().add(0, "ught>so")) == [(REASONING, "so")]
    assert tracker.flush() == [(ANSWER, "\n <tho")]
    assert tracker.next is ANSWER


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["Hi", "<think>", "a", "</think>", "b"], [(ANSWER, "Hi"), (REASONING, "a"), (ANSWER, "b")]),
        (["<think>", "a", "</think>", "b<think>c"], [(REASONING, "a"), (ANSWER, "b<think>c")]),
        (["a", "</think>", "b"], [(ANSWER, "a</think>b")]),
        (["<think>", "</think>", "b"], [(ANSWER, "b")]),
        (["<think>", "a</thin", "k"], [(REASONING, "a</think")]),
        (["  "], [(ANSWER, "  ")]),
    ],
)
def test_reasoning_comes_once_and_marks_out_of_their_place_are_text(
    kind: str, texts: list[str], expected: list[Piece]
) -> None:
    known = vocabulary(kind, "added")
    assert told(known, as_tokens(known, *texts), Opening.EITHER) == expected


@pytest.mark.parametrize("marks", MARKS)
def test_a_model_may_repeat_the_mark_that_its_prompt_ends_with(marks: str) -> None:
    known = vocabulary("byte-level", marks)
    for said in (["<think>", "a"], ["\n", "<think>", "a"]):
        ids = as_tokens(known, *said, "</think>", "b")
        assert told(known, ids, Opening.REASONING) == [(REASONING, "a"), (ANSWER, "b")]
    later = as_tokens(known, "\na<thi", "</think>", " b")
    assert told(known, later, Opening.REASONING) == [(REASONING, "\na<thi"), (ANSWER, " b")]
    assert told(known, as_tokens(known, "\n", "</think>", "b"), Opening.REASONING) == [
        (REASONING, "\n"),
        (ANSWER, "b"),
    ]


def test_a_mark_that_is_plain_text_begins_reasoning_at_the_beginning_alone() -> None:
    exaone = FORMATS["exaone"]
    known = vocabulary("byte-level", output_format=exaone)
    text = "A tag is <thought>x</thought>."
    assert told(known, as_tokens(known, text), Opening.EITHER, exaone) == [(ANSWER, text)]
    assert told(known, as_tokens(known, "<thought>x</thought>."), Opening.ANSWER, exaone) == [
        (ANSWER, "<thought>x</thought>.")
    ]


def test_letters_that_spell_a_mark_are_none_where_the_mark_is_a_token() -> None:
    known = vocabulary("byte-level", "special")
    spelled = [byte_token(known, byte) for byte in b"</think>"]
    ids = [*spelled, *as_tokens(known, "</think>", "b")]
    assert told(known, ids, Opening.REASONING) == [(REASONING, "</think>"), (ANSWER, "b")]


def test_a_mark_may_be_a_token_with_text_behind_it() -> None:
    gemma = FORMATS["gemma"]
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|channel>", "<channel|>"])
    known = Vocabulary(tokenizer)
    ids = as_tokens(known, "<|channel>", "thought\nso", "<channel|>", "b")
    assert told(known, ids, Opening.EITHER, gemma) == [(REASONING, "so"), (ANSWER, "b")]
    other = as_tokens(known, "<|channel>", "else")
    assert told(known, other, Opening.EITHER, gemma) == [(ANSWER, "else")]


def test_any_of_a_formats_marks_counts() -> None:
    granite = FORMATS["granite"]
    known = vocabulary("byte-level")
    text = "Here's my thought process: a Here is my response: b"
    assert told(known, as_tokens(known, text), Opening.EITHER, granite) == [(REASONING, " a "), (ANSWER, " b")]


def test_a_character_that_a_mark_cuts_off_ends_with_its_part() -> None:
    known = vocabulary("byte-level", "special")
    request = GenerationRequest("r", (65,), SamplingParams(max_tokens=4), opening=Opening.REASONING)
    choice = Choice.of(
        request, 0, detokenizer=Detokenizer(known, (65,)), eos_token_ids=(), observer=NullObserver(),
        markup=Markup(THINK, known),
    )  # fmt: skip
    ids = [byte_token(known, 0xC3), *as_tokens(known, "</think>"), *(byte_token(known, byte) for byte in (0xA9, 66))]
    chunks = [choice.grow(token_id, None) for token_id in ids]
    assert "".join(chunk.reasoning for chunk in chunks) == "\ufffd"
    assert "".join(chunk.text for chunk in chunks) == "\ufffdB"
    assert [chunk.segment for chunk in chunks] == [REASONING, REASONING, ANSWER, ANSWER]
