import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engines.text import Detokenizer, StopMatcher
from server.engines.vocabulary import Vocabulary
from tests.conftest import byte_tokenizer
from tests.engines.tokenizers import KINDS, SPECIAL, WORDS

TOKENIZER = byte_tokenizer()
BYTES = Vocabulary(TOKENIZER.backend_tokenizer)


@given(st.text(max_size=40))
def test_pieces_join_to_the_whole_and_none_holds_a_part_of_a_character(text: str) -> None:
    detokenizer = Detokenizer(BYTES, TOKENIZER("hello")["input_ids"])
    pieces = [detokenizer.add(token).text for token in TOKENIZER(text)["input_ids"]]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@pytest.mark.parametrize("pieces", [["baa"], ["b", "aa"], ["ba", "a"], ["b", "a", "a"]])
def test_the_stop_string_that_completes_first_wins_even_in_one_piece(pieces: list[str]) -> None:
    matcher = StopMatcher(["a", "baa"])
    assert "".join(matcher.add(piece) for piece in pieces if not matcher.has_stopped) == "b"


@settings(max_examples=500)
@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_a_stop_string_is_found_wherever_the_text_is_cut(text: str, stop: list[str], data: st.DataObject) -> None:
    matcher, out, rest = StopMatcher(stop), "", text
    while rest and not matcher.has_stopped:
        size = data.draw(st.integers(1, len(rest)))
        out, rest = out + matcher.add(rest[:size]), rest[size:]
        # Held back is what may begin a stop string, and no more.
        held = text[len(out) : len(text) - len(rest)]
        assert matcher.has_stopped or held == "" or any(s.startswith(held) and s != held for s in stop)
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


@pytest.mark.parametrize("ending", ["1234 \ufffd", "😀"])
def test_a_prompt_that_ends_in_an_open_character_does_not_leak_into_the_text(ending: str) -> None:
    prompt = TOKENIZER(f"The code is {ending}")["input_ids"]
    for context in (prompt, prompt[:-1], prompt[:-2]):
        detokenizer = Detokenizer(BYTES, context)
        assert "".join(detokenizer.add(token).text for token in TOKENIZER(" is it")["input_ids"]) == " is it"


SENTENCEPIECE = KINDS["sentencepiece"]
_SPECIAL = SENTENCEPIECE.token_to_id(SPECIAL)


@given(
    st.lists(st.integers(0, len(WORDS) - 1), min_size=1, max_size=12),
    st.lists(st.sampled_from([*range(len(WORDS)), _SPECIAL]), max_size=12),
)
def test_the_text_is_what_follows_the_prompts_in_the_decoding_of_both(prompt: list[int], new: list[int]) -> None:
    detokenizer = Detokenizer(Vocabulary(SENTENCEPIECE), prompt)
    # A space alone at the front would be taken for the one that is left out.
    whole = SENTENCEPIECE.decode([0, *prompt, *new])[len(SENTENCEPIECE.decode([0, *prompt])) :]
    assert "".join(detokenizer.add(token).text for token in new) == whole


def test_special_tokens_never_become_text() -> None:
    for prompt in ([_SPECIAL], [_SPECIAL, 0], [0, _SPECIAL]):
        detokenizer = Detokenizer(Vocabulary(SENTENCEPIECE), prompt)
        # The first space of a text is left out, and that of this one is in the prompt unless it holds no text.
        first = "bc" if prompt == [_SPECIAL] else " bc"
        assert [detokenizer.add(token).text for token in (_SPECIAL, 1, _SPECIAL, 2)] == ["", first, "", "d"]


def test_a_byte_fallback_decoder_that_rewrites_its_text_changes_nothing_that_is_out() -> None:
    tokenizer = KINDS["byte fallback"]
    detokenizer = Detokenizer(Vocabulary(tokenizer), [0])
    tokens = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "天".encode() + b"\xff"]
    text = "".join(detokenizer.add(token).text for token in [*tokens, 2, 2])
    # A decoding of the whole would make all four bytes replacement characters, and 天 is out already.
    assert text == "天\ufffddd"


def test_special_tokens_behind_held_text_are_not_kept_one_by_one() -> None:
    """A second token by token once took minutes, in the loop that all requests share."""
    stop = StopMatcher(["ab", "a<|x|>"])
    assert [stop.add("a"), *(stop.add("", "<|y|>") for _ in range(500))] == [""] * 501
    assert len(stop._held) < 10
    assert (stop.add("", "<|x|>"), stop.has_stopped) == ("", False)
    assert (stop.copy().add("c"), stop.add("b"), stop.has_stopped) == ("ac", "", True)
