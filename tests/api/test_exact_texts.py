"""Texts, tokens and log-probabilities over HTTP, by an engine whose tokens are bytes: all of them agree."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.engines.embedded.engine import EmbeddedEngine
from server.settings import Settings
from server.telemetry import Telemetry
from tests.api.conftest import chat, complete
from tests.api.test_completions import events
from tests.conftest import EOS, byte_tokenizer

NAME = byte_tokenizer().decode([EOS])
"""Of the special token that ends texts."""

# Equally likely bytes that begin, continue and are characters.
LETTERS = {str(byte_tokenizer()(text)["input_ids"][at]): 100 for text, at in (("😀", 0), ("😀", 1), ("é", 0), ("a", 0))}


@pytest.fixture(scope="module")
def tiny(model_folder: Callable[..., Path]) -> Iterator[TestClient]:
    settings = Settings(model=str(model_folder()), served_model_name="tiny", device="cpu", dtype="float32")
    telemetry = Telemetry()
    with TestClient(create_app(settings, EmbeddedEngine(settings, observer=telemetry), telemetry)) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
def test_a_chats_bytes_are_the_tokens_own_and_join_to_the_text(tiny: TestClient, stream: bool) -> None:
    for seed in range(3):
        options: dict[str, Any] = {"logit_bias": LETTERS, "seed": seed, "max_tokens": 12, "ignore_eos": True}
        response = chat(tiny, model="tiny", logprobs=True, top_logprobs=2, stream=stream, **options)
        choices = [c for event in events(response) for c in event["choices"]] if stream else response.json()["choices"]
        text = "".join((c["delta"] if stream else c["message"])["content"] for c in choices)
        entries = [entry for c in choices for entry in c["logprobs"]["content"]]
        assert len(entries) == 12
        assert all(len(entry["bytes"]) == 1 for entry in entries)
        joined = bytes(byte for entry in entries for byte in entry["bytes"])
        assert joined.decode(errors="replace") == text == "".join(entry["token"] for entry in entries)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("num_top", [0, 1, 5])
def test_a_completions_tokens_and_offsets_are_those_of_its_text(
    tiny: TestClient, num_top: int, echo: bool, stream: bool
) -> None:
    options: dict[str, Any] = {"prompt": "né😀", "temperature": 1.8, "max_tokens": 12, "ignore_eos": True, "seed": 5}
    response = complete(tiny, model="tiny", logit_bias=LETTERS, logprobs=num_top, echo=echo, stream=stream, **options)
    choices = [c for event in events(response) for c in event["choices"]] if stream else response.json()["choices"]
    text = "".join(choice["text"] for choice in choices)
    logprobs = {name: [x for c in choices for x in c["logprobs"][name]] for name in choices[0]["logprobs"]}
    offsets = logprobs["text_offset"]
    assert "".join(logprobs["tokens"]) == text
    assert [text[a:b] for a, b in itertools.pairwise([*offsets, len(text)])] == logprobs["tokens"]
    for at, (token, logprob, top) in enumerate(
        zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    ):
        if echo and at == 0:
            assert (token, logprob, top) == ("n", None, None)
        else:
            assert top[token] == logprob
            assert max(num_top, 1) <= len(top) <= num_top + 1


def test_an_echoed_prompt_of_token_ids_that_ends_in_an_open_character_agrees_with_its_tokens(tiny: TestClient) -> None:
    ids = [EOS, *byte_tokenizer()("a😀")["input_ids"][:-1]]
    options: dict[str, Any] = {"prompt": ids, "echo": True, "logprobs": 0, "max_tokens": 0}
    (choice,) = complete(tiny, model="tiny", **options).json()["choices"]
    assert choice["text"] == f"{NAME}a\ufffd"
    assert choice["logprobs"]["tokens"] == [NAME, "a", "", "", "\ufffd"]
    assert choice["logprobs"]["text_offset"] == [0, 5, 6, 6, 6]


@pytest.mark.parametrize("send", [complete, chat])
@pytest.mark.parametrize("stream", [False, True])
def test_a_special_token_is_a_stop_string(tiny: TestClient, send: Callable[..., Any], stream: bool) -> None:
    options: dict[str, Any] = {"ignore_eos": True, "logit_bias": {str(EOS): 100}, "max_tokens": 20, "stream": stream}
    for stop, num_tokens in (([NAME], 1), (2 * NAME, 2), ([NAME[1:-1]], 20)):
        usage = {"stream_options": {"include_usage": True}} if stream else {}
        response = send(tiny, model="tiny", stop=stop, **options, **usage)
        bodies = events(response) if stream else [response.json()]
        (reason,) = {c["finish_reason"] for body in bodies for c in body["choices"] if c["finish_reason"]}
        assert bodies[-1]["usage"]["completion_tokens"] == num_tokens
        assert reason == ("length" if num_tokens == 20 else "stop")


def test_special_tokens_and_the_template_are_told_under_the_names_of_transformers(tiny: TestClient) -> None:
    tokenizer = byte_tokenizer()
    assert tiny.get("/tokenizer_info").json() == {
        "tokenizer_class": type(tokenizer).__name__,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": None,
        "unk_token": None,
        "chat_template": tokenizer.chat_template,
        "model_max_length": 256,
    }
