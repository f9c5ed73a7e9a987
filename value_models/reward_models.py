"""Sequence-classification models as rewards: loaded from a folder or a hub id, and read in batches by length.

Texts are sorted by their number of tokens before they are batched, so that little of a batch is padding: at most
PADDING_SHARE of it, and a batch is at most BATCH_TOKENS with its padding. Knows nothing of rollouts. Enter at
`load_reward_model`.
"""

# transformers leaves types out of `from_pretrained`.
# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from value_models.errors import RewardError

PREFIX = "hf:"
BATCH_TOKENS = 8192
PADDING_SHARE = 0.2
_MAX_TOKENS = 512
_PAD_TO = 8
"""Short texts differ by a token or two, which is no reason for a batch each."""


def load_reward_model(
    source: str, *, device: str = "cpu", dtype: str = "auto"
) -> Callable[[Sequence[str], Sequence[str]], list[float]]:
    """The logit of a one-label model, or the log-probability of a label (by name or index; the last by default).

    `source` is `<folder or hub id>[#label]`; `dtype` is `float32` or `bfloat16`, or `auto` for that of the file. Prompt
    and response go in as a pair of texts, cut to what the model can read, 512 tokens at most. Raises RewardError.
    """
    folder, _, label = source.partition("#")
    tokenizer, model = _load_classifier(folder, device, dtype)
    column = _label_column(model.config, label)
    is_multi_label = model.config.problem_type == "multi_label_classification"
    positions = getattr(model.config, "max_position_embeddings", None) or _MAX_TOKENS
    max_length = min(tokenizer.model_max_length, positions, _MAX_TOKENS)

    @torch.inference_mode()
    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        if not responses:
            return []
        cut = {"truncation": True, "max_length": max_length}
        lengths = [len(ids) for ids in tokenizer(list(prompts), list(responses), **cut)["input_ids"]]
        scores = [0.0] * len(responses)
        for batch in batches_by_length(lengths):
            texts = [[side[index] for index in batch] for side in (prompts, responses)]
            read = tokenizer(*texts, **cut, padding=True, return_tensors="pt").to(device)
            logits: Tensor = model(**read).logits.float()
            if column is None:
                found = logits[:, 0]
            else:
                log_probs: Tensor = functional.logsigmoid(logits) if is_multi_label else logits.log_softmax(dim=-1)
                found = log_probs[:, column]
            for index, score in zip(batch, map(float, found.unbind()), strict=True):
                scores[index] = score
        return scores

    return reward


def model_identity(source: str) -> dict[str, Any]:
    """What tells one reward model from another: its files' names, sizes and times, or a hub id with its revision."""
    folder = Path(source.partition("#")[0])
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.is_file())
        return {
            "folder": str(folder.resolve()),
            "files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        }
    config = cast(Any, AutoConfig.from_pretrained(str(folder), trust_remote_code=False))
    return {"id": str(folder), "revision": getattr(config, "_commit_hash", None)}


def batches_by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of texts that are read together, the longest first; see PADDING_SHARE and BATCH_TOKENS."""
    batch: list[int] = []
    longest, num_tokens = 0, 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        padded = longest * (len(batch) + 1)
        wasted = padded - num_tokens - length
        if batch and (padded > BATCH_TOKENS or (longest - length > _PAD_TO and wasted > PADDING_SHARE * padded)):
            yield batch
            batch, longest, num_tokens = [], 0, 0
        longest = max(longest, length)
        batch.append(index)
        num_tokens += length
    if batch:
        yield batch


def _load_classifier(folder: str, device: str, dtype: str) -> tuple[Any, Any]:
    """Tokenizer and model, able to pad. Raises RewardError, also for a model whose classifier is not in the file."""
    try:
        tokenizer = cast(Any, AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
        loaded = cast(
            Any,
            AutoModelForSequenceClassification.from_pretrained(
                folder, trust_remote_code=False, use_safetensors=True, output_loading_info=True, dtype=dtype
            ),
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise RewardError(f"reward: cannot load the classifier {folder!r}: {error}") from error
    model, info = loaded
    if absent := sorted([*info["missing_keys"], *info["mismatched_keys"]]):
        # transformers would fill these at random, and the reward would be noise.
        raise RewardError(f"reward: {folder!r} is no trained classifier; its files lack {', '.join(map(str, absent))}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise RewardError(f"reward: the tokenizer of {folder!r} has neither a padding nor an end-of-sequence token")
    # The model finds a text's last token by what the tokenizer pads with, whatever its own configuration says.
    model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, model.eval().to(device)


def _label_column(config: Any, label: str) -> int | None:
    """The column of the logits that a label names, or None for a model with a single output. Raises RewardError."""
    names = {str(name): index for index, name in config.id2label.items()}
    if config.num_labels == 1 and label in ("", "0", *names):
        return None
    if not label:
        return config.num_labels - 1
    if label in names:
        return int(names[label])
    if label.isdigit() and int(label) < config.num_labels:
        return int(label)
    raise RewardError(f"reward: the classifier has no label {label!r}; it has {', '.join(names)}")
