"""A model of another architecture than the default's, from its packages: conversion, engine and heads know no names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.control.registry import HeadRegistry
from server.engines.checkpoint.packaged import PACKAGED_MODELS, packaged_model_folder
from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.loader import LoadedModel, load_model
from server.errors import HeadMismatchError
from server.settings import DEFAULT_MODEL
from server.types import GenerationRequest, SamplingParams
from tests.conftest import control, random_head, run
from value_models.store import shipped_heads_folder

pytestmark = pytest.mark.slow
NAME = "gemma-3-270m"
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def folder() -> Path:
    """In a fresh clone this is where the packages are converted, once (about 45 s)."""
    return packaged_model_folder(PACKAGED_MODELS[NAME])


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(NAME, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(loaded: LoadedModel) -> Any:
    return loaded.tokenizer


@pytest.fixture(scope="module")
def core(loaded: LoadedModel) -> EngineCore:
    head = random_head(1, hidden_size=loaded.identity["hidden_size"])
    return EngineCore(loaded, HeadRegistry({"random": head}), max_batch_size=2)


def test_the_converted_model_finds_english_likely(plain: Any, tokenizer: Any) -> None:
    """Norm weights left as the file stores them, one too large, give more than ten nats a token."""
    text = "In 1905 Albert Einstein published four papers that changed physics. The first was about light."
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.inference_mode():
        assert plain(ids, labels=ids).loss < 3.5


def test_a_text_becomes_tokens_after_one_beginning_of_text_and_comes_back_whole(tokenizer: Any) -> None:
    for text in (PROMPT, " two  spaces,\n\n\tlines\r\n", "naïve 日本語 😀 <h1>1,234</h1> \x00"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(ids[1:]) == text


@pytest.mark.parametrize("num_repeats", [1, 110], ids=["short", "beyond the sliding window"])
def test_greedy_tokens_and_their_likelihoods_are_those_of_transformers_generate(
    num_repeats: int, plain: Any, core: EngineCore, tokenizer: Any
) -> None:
    ids = torch.tensor([tokenizer(" ".join([PROMPT] * num_repeats))["input_ids"]])
    length = ids.shape[1]
    assert (length > plain.config.sliding_window) == (num_repeats > 1)
    whole = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    sampling = SamplingParams(max_tokens=8, temperature=0.0, logprobs=1)
    result = run(core, [GenerationRequest("r", tuple(ids[0].tolist()), sampling)])["r", 0]
    assert result.token_ids == whole[0, length:].tolist()
    assert result.text == tokenizer.decode(result.token_ids)
    with torch.inference_mode():
        logps = plain(whole, logits_to_keep=9).logits[0, :-1].log_softmax(dim=-1).amax(dim=-1)
    assert [entry.logprob for chunk in result.chunks for entry in chunk.logprobs] == pytest.approx(
        logps.tolist(), abs=1e-3
    )


def test_a_head_moves_its_tokens_within_the_budget(core: EngineCore, tokenizer: Any) -> None:
    request = GenerationRequest(
        "r",
        tuple(tokenizer(PROMPT)["input_ids"]),
        SamplingParams(max_tokens=4, seed=1),
        control=control({"random": 1.0}, step_size=1.0, max_kl=0.3),
    )
    edits = [chunk.edit for chunk in run(core, [request])["r", 0].chunks]
    assert all(edit is not None and 0.01 < edit.kl <= 0.3 for edit in edits)


def test_a_head_of_the_default_model_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(HeadMismatchError, match="was not made for the model 'gemma-3-270m'"):
        HeadRegistry.load(shipped_heads_folder(DEFAULT_MODEL), loaded.identity)
