import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engines.embedded.detokenizer import Detokenizer, StopMatcher
from tests.conftest import byte_tokenizer

TOKENIZER = byte_tokenizer()


@given(st.text(max_size=40))
def test_pieces_join_to_the_whole_and_none_holds_a_part_of_a_character(text: str) -> None:
    detokenizer = Detokenizer(TOKENIZER.backend_tokenizer, TOKENIZER("hello")["input_ids"])
    pieces = [detokenizer.add(token) for token in TOKENIZER(text)["input_ids"]]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_a_stop_string_is_found_wherever_the_text_is_cut(text: str, stop: list[str], data: st.DataObject) -> None:
    matcher, out, rest = StopMatcher(stop), "", text
    while rest and not matcher.has_stopped:
        size = data.draw(st.integers(1, len(rest)))
        out, rest = out + matcher.add(rest[:size]), rest[size:]
    if not matcher.has_stopped:
        out += matcher.flush()
    ends = [at for at in (text.find(s) for s in stop) if at >= 0]
    assert matcher.has_stopped == bool(ends)
    assert out == (text[: _first_end(text, stop)] if ends else text)


def _first_end(text: str, stop: list[str]) -> int:
    """Start of the match that completes first; the earliest start among those that complete together."""
    done = min(text.find(s) + len(s) for s in stop if s in text)
    return min(text.find(s) for s in stop if s in text[:done])


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["END"])
    assert [matcher.add(piece) for piece in ("aE", "N", "x")] == ["a", "", "ENx"]


def test_a_stop_string_is_a_literal() -> None:
    matcher = StopMatcher(["(a+)+$"])
    assert matcher.add("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!") == "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!"
    assert matcher.add("(a+)+$ and more") == ""
    assert matcher.has_stopped


@pytest.mark.parametrize("stop", [[], ["zzz"]])
def test_without_a_match_everything_comes_out(stop: list[str]) -> None:
    matcher = StopMatcher(stop)
    assert matcher.add("zz top ") + matcher.add("z") + matcher.flush() == "zz top z"
