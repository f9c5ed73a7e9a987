"""Texts, bytes and places of tokens, for every kind of tokenizer: what is streamed is one decoding of it all."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from server.api.completions import LegacyEntry, legacy_logprobs, placed
from server.engines.base import NullObserver
from server.engines.choice import Choice
from server.engines.text import Detokenizer, as_chosen, with_texts
from server.engines.vocabulary import Vocabulary, words_of_tokens
from server.types import (
    FinishReason,
    GenerationChunk,
    GenerationRequest,
    SamplingParams,
    TokenLogprob,
    TokenText,
    TopLogprob,
)
from tests.engines.tokenizers import KINDS, SPECIAL

BYTES = ("byte-level", "byte fallback", "sentencepiece")


def vocabulary_of(kind: str) -> Vocabulary:
    return Vocabulary(KINDS[kind])


VOCABULARIES = {kind: vocabulary_of(kind) for kind in KINDS}


def tokens_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Any tokens, where bytes that are no characters come as often as others."""
    return st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=20)


def characters_of(kind: str) -> st.SearchStrategy[list[int]]:
    """Tokens whose bytes, if there are any, are those of characters."""
    tokenizer = KINDS[kind]
    names = [name for name in tokenizer.get_vocab() if not name.startswith("<0x")]
    if kind == "byte-level":
        one: st.SearchStrategy[list[int]] = st.text(max_size=4).map(lambda text: tokenizer.encode(text).ids)
        return st.lists(one | st.just([tokenizer.token_to_id(SPECIAL)]), max_size=6).map(joined)
    words = st.sampled_from([[tokenizer.token_to_id(name)] for name in names])
    if kind in BYTES:
        words |= st.characters(codec="utf-8").map(
            lambda letter: [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in letter.encode()]
        )
    return st.lists(words, max_size=12).map(joined)


def joined(lists: list[list[int]]) -> list[int]:
    return [token_id for tokens in lists for token_id in tokens]


def streamed(kind: str, prompt: list[int], new: list[int]) -> list[TokenText]:
    """What each new token is; the last also has what was open."""
    text = Detokenizer(VOCABULARIES[kind], prompt)
    tokens = [text.add(token_id) for token_id in new]
    return [*tokens, TokenText(text.flush(), b"")]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_streamed_text_is_one_decoding_of_all_tokens(kind: str, data: st.DataObject) -> None:
    tokenizer, tokens = KINDS[kind], data.draw(characters_of(kind))
    assert "".join(token.text for token in streamed(kind, [], tokens)) == tokenizer.decode(tokens)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_bytes_join_to_the_text_whatever_the_tokens_are(kind: str, data: st.DataObject) -> None:
    prompt, new = data.draw(tokens_of(KINDS[kind])), data.draw(tokens_of(KINDS[kind]))
    tokens = streamed(kind, prompt, new)
    data_of_text = b"".join(token.data for token in tokens if not token.is_special)
    assert data_of_text.decode(errors="replace") == "".join(token.text for token in tokens)
    if kind == "byte-level":
        assert KINDS[kind].decode(new) == data_of_text.decode(errors="replace")


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_fork_at_any_token_goes_on_with_the_same_text(kind: str, data: st.DataObject) -> None:
    tokens = data.draw(tokens_of(KINDS[kind]))
    at = data.draw(st.integers(0, len(tokens)))
    text = Detokenizer(VOCABULARIES[kind], ())
    begun = [text.add(token_id) for token_id in tokens[:at]]
    fork = text.copy()
    for token_id in tokens:
        text.add(token_id)  # It does not feel what becomes of the first.
    assert [*begun, *(fork.add(token_id) for token_id in tokens[at:])] == streamed(kind, [], tokens)[:-1]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_offsets_count_the_texts_characters_and_never_fall(kind: str, data: st.DataObject) -> None:
    tokens = streamed(kind, [], data.draw(tokens_of(KINDS[kind])))[:-1]
    whole = "".join(token.text for token in tokens)
    scores = [as_chosen(TokenLogprob(0, "", -1.0), token) for token in tokens]
    logprobs, end = legacy_logprobs(list(map(LegacyEntry.of, scores)), 0)
    offsets = [*logprobs["text_offset"], end]
    assert offsets == sorted(offsets)
    assert end == len(whole)
    for token, name, start, stop in zip(tokens, logprobs["tokens"], offsets, offsets[1:], strict=False):
        assert whole[start:stop] == ("" if token.is_special else name)


@pytest.mark.parametrize("kind", BYTES)
@given(data=st.data())
def test_an_echoed_prompts_tokens_are_placed_in_its_text(kind: str, data: st.DataObject) -> None:
    tokenizer, ids = KINDS[kind], data.draw(characters_of(kind))
    tokens = streamed(kind, [], ids)[:-1]
    for skips in (True, False):
        text = tokenizer.decode(ids, skip_special_tokens=skips)
        shares = placed(tokens, text)
        assert sum(size for _, size in shares) == len(text)
        assert "".join(shown for shown, size in shares if size) == text


def test_a_space_behind_a_special_token_is_a_tokens_own() -> None:
    tokens = [TokenText("", b"<|end|>", is_special=True), TokenText("", b"")]
    assert placed(tokens, "<|end|> ") == [("<|end|>", 7), (" ", 1)]
    assert placed(tokens, "") == [("<|end|>", 0), ("", 0)]


def test_a_prompt_whose_letters_the_tokenizer_changes_is_placed_as_far_as_it_goes() -> None:
    tokens = [TokenText("", b"<s>", is_special=True), TokenText("the", b"the"), TokenText(" end", b" end")]
    assert placed(tokens, "THE E") == [("<s>", 0), ("the", 3), (" end", 2)]


def scored(kind: str, prompt: str, token: str, others: list[str]) -> TokenLogprob:
    tokenizer = KINDS[kind]
    ids = [tokenizer.token_to_id(name) for name in (token, *others)]
    top = tuple(TopLogprob(i, "", -float(at)) for at, i in enumerate(ids))
    text = Detokenizer(VOCABULARIES[kind], [tokenizer.token_to_id(prompt)])
    score = with_texts(TokenLogprob(ids[0], "", -0.0, top), text)
    return as_chosen(score, text.add(ids[0]))


@pytest.mark.parametrize(
    ("kind", "token", "others", "names"),
    [
        ("byte fallback", "d", ["<0x64>", "\u2581", "<0x20>", "<0xF0>"],
         ["d", "token_id:105", " ", "token_id:37", "bytes:\\xf0"]),
        ("byte fallback", "<0xF0>", ["<0xF1>", SPECIAL, "<think>"], ["", "bytes:\\xf1", SPECIAL, "<think>"]),
        ("byte-level", "ðŁ", ["ð", "Ł"], ["", "bytes:\\xf0", "bytes:\\x9f"]),
        ("sentencepiece", "\u2581a", ["<0x0A>"], [" a", "\n"]),
    ],
)  # fmt: skip
def test_distinct_tokens_have_distinct_names_in_the_map(
    kind: str, token: str, others: list[str], names: list[str]
) -> None:
    score = scored(kind, "d" if kind != "byte-level" else "a", token, others)
    logprobs, _ = legacy_logprobs([LegacyEntry.of(score)], 0)
    assert list(logprobs["top_logprobs"][0]) == names
    assert logprobs["tokens"][0] == names[0]


@pytest.mark.parametrize(
    ("kind", "token", "data"),
    [("byte-level", "ðŁ", b"\xf0\x9f"), ("byte-level", "Ġ", b" "), ("sentencepiece", "<0x0A>", b"\n"),
     ("sentencepiece", "\u2581bc", b" bc"), ("metaspace", "\u2581bc", b" bc"), ("byte fallback", "\u2581", b" "),
     ("word pieces", "c", b" c"), ("word pieces", "##b", b"b"), ("byte fallback", SPECIAL, SPECIAL.encode()),
     ("metaspace", "<think>", b"<think>")],
)  # fmt: skip
def test_a_tokens_bytes_are_its_own(kind: str, token: str, data: bytes) -> None:
    first = 0 if kind != "byte-level" else KINDS[kind].token_to_id("a")
    assert VOCABULARIES[kind].token_bytes(KINDS[kind].token_to_id(token), first) == data


def test_a_token_that_does_not_exist_has_no_bytes() -> None:
    assert VOCABULARIES["byte-level"].token_bytes(9999, None) == b""


def grown(kind: str, new: list[str], **sampling: Any) -> list[GenerationChunk]:
    """The chunks of a choice that draws these tokens and never ends by itself."""
    tokenizer = KINDS[kind]
    request = GenerationRequest("r", (0,), SamplingParams(**{"max_tokens": len(new), **sampling}))
    choice = Choice.of(
        request, 0, detokenizer=Detokenizer(VOCABULARIES[kind], (0,)), eos_token_ids=(), observer=NullObserver()
    )
    chunks: list[GenerationChunk] = []
    while not chunks or chunks[-1].finish_reason is None:
        token_id = tokenizer.token_to_id(new[len(chunks)])
        chunks.append(choice.grow(token_id, None, logprob=TokenLogprob(token_id, "", -1.0)))
    return chunks


@pytest.mark.parametrize(
    ("stop", "new", "text", "num_tokens"),
    [
        ([SPECIAL], ["d", SPECIAL, "ef"], "d", 2),
        ([SPECIAL], ["d", "ef"], "def", 2),
        (["f" + SPECIAL], ["ef", SPECIAL, "d"], "e", 2),
        (["f" + SPECIAL], ["ef", "d", SPECIAL], "efd", 3),
        ([SPECIAL + " a"], ["d", SPECIAL, "\u2581a", "d"], "d", 3),
        ([SPECIAL + " a"], ["d", SPECIAL, "\u2581bc", "d"], "d bcd", 4),
        # The text that is returned holds a stop string across a special token, and a part of one's name is no match.
        (["de"], ["d", SPECIAL, "ef", "d"], "", 3),
        (["end"], ["d", SPECIAL, "ef"], "def", 3),
        ([SPECIAL, "d"], ["ef", SPECIAL, "d"], "ef", 2),
        (["<think>"], ["d", "<think>", "d"], "d", 2),
    ],
)
def test_a_stop_string_may_be_or_hold_a_special_tokens_name(
    stop: list[str], new: list[str], text: str, num_tokens: int
) -> None:
    chunks = grown("byte fallback", new, stop=tuple(stop))
    assert ("".join(chunk.text for chunk in chunks), len(chunks)) == (text, num_tokens)
    has_stopped = num_tokens < len(new) or not text
    assert chunks[-1].finish_reason is (FinishReason.STOP if has_stopped else FinishReason.LENGTH)


def test_a_text_that_ends_in_an_open_character_says_so_once_and_tokens_still_join_to_it() -> None:
    for stop in ((), ("zz",)):
        chunks = grown("byte-level", ["a", "ðŁ", "ðŁ"], stop=stop)
        assert "".join(chunk.text for chunk in chunks) == "a\ufffd\ufffd"
        assert [chunk.logprobs[0].text for chunk in chunks] == ["a", "", "\ufffd\ufffd"]
        assert [chunk.logprobs[0].data for chunk in chunks] == [b"a", b"\xf0\x9f", b"\xf0\x9f"]


@given(st.lists(st.sampled_from(["a", "ðŁ", "ĺ", "Ģ", SPECIAL]), min_size=1, max_size=12), st.data())
def test_a_stopped_text_is_what_is_before_the_stop_string_however_it_is_cut(
    new: list[str], data: st.DataObject
) -> None:
    stop = data.draw(st.sampled_from(["aa", "😀", "a😀", SPECIAL, "a" + SPECIAL, SPECIAL + "a"]))
    tokenizer = KINDS["byte-level"]
    ids = [tokenizer.token_to_id(name) for name in new]
    shown = tokenizer.decode(ids, skip_special_tokens=SPECIAL not in stop)
    text = "".join(chunk.text for chunk in grown("byte-level", new, stop=(stop,)))
    if SPECIAL not in stop:
        assert text == shown.split(stop)[0]
    elif "\ufffd" in shown:
        # Bytes that complete no character are no text yet when a special token comes behind them.
        return
    elif stop in shown:
        assert text == shown.split(stop)[0].replace(SPECIAL, "")
    else:
        assert text == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["sentencepiece", "metaspace", "byte fallback", "word pieces"])
def test_words_are_those_of_tokens_that_begin_one_behind_a_space(kind: str) -> None:
    tokenizer = KINDS[kind]
    words = words_of_tokens(VOCABULARIES[kind], tokenizer.get_vocab_size())
    begin = {name.removeprefix("\u2581"): i for name, i in tokenizer.get_vocab().items() if name[0] == "\u2581"}
    expected = {i: name for name, i in begin.items() if name.isalpha()}
    assert words == ({0: "a", 2: "c"} if kind == "word pieces" else expected)
