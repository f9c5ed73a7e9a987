"""Rewards: what a head is trained to predict. A reward is a pure batch function of prompts and responses.

Built-in ones run offline. `hf:<folder or hub id>` scores with a sequence-classification model, `module:function` with
the user's own callable. Knows nothing of heads or training. Enter at `load_reward`; to add one, write a function and
put it in REWARDS.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

Reward = Callable[[Sequence[str], Sequence[str]], list[float]]
_HF_BATCH = 16


class RewardError(ValueError):
    """An unknown reward, one whose library is missing, or one that does not return a finite number a response."""


def positive(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """VADER's compound sentiment, -1 to 1 (Hutto and Gilbert 2014)."""
    del prompts
    analyser = _library("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
    return [analyser.polarity_scores(response)["compound"] for response in responses]


def plain(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Flesch reading ease within 0 to 100, over 100: short sentences and short words score high. No words: 0.5."""
    del prompts
    textstat = _library("textstat")
    return [
        min(max(textstat.flesch_reading_ease(response), 0.0), 100.0) / 100.0 if _has_words(response) else 0.5
        for response in responses
    ]


def brevity(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Minus the number of words, over 50."""
    del prompts
    return [-len(response.split()) / 50.0 for response in responses]


REWARDS: dict[str, Reward] = {"positive": positive, "plain": plain, "brevity": brevity}


def load_reward(name: str) -> Reward:
    """A built-in reward, `hf:<folder or hub id>[#label]`, or `module:function`; its scores are checked.

    Raises RewardError, at once for an unknown name and on use for wrong scores.
    """
    if name in REWARDS:
        reward = REWARDS[name]
    elif name.startswith("hf:"):
        reward = _hugging_face_reward(name.removeprefix("hf:"))
    elif ":" in name:
        reward = _user_reward(name)
    else:
        raise RewardError(
            f"reward: there is no reward {name!r}. Known: {', '.join(sorted(REWARDS))}; or hf:<folder or hub id>, "
            "or module:function"
        )

    def checked(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        scores = [float(score) for score in reward(prompts, responses)]
        if len(scores) != len(responses) or not all(map(math.isfinite, scores)):
            raise RewardError(f"reward {name!r} must return one finite number for each of {len(responses)} responses")
        return scores

    return checked


def _user_reward(name: str) -> Reward:
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise RewardError(f"reward: {name!r} cannot be imported: {error}") from error
    if not callable(function):
        raise RewardError(f"reward: {name!r} is not callable; it must take prompts and responses")
    return function  # type: ignore[return-value]


def _hugging_face_reward(source: str) -> Reward:
    """The logit of a one-label model, or the log-probability of a label (by name or index; the last by default)."""
    folder, _, label = source.partition("#")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise RewardError(f"reward: cannot load the classifier {folder!r}: {error}") from error
    model.eval()
    column = _label_column(model.config, label)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id

    @torch.inference_mode()
    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        scores: list[float] = []
        for first in range(0, len(responses), _HF_BATCH):
            last = first + _HF_BATCH
            batch = tokenizer(
                list(prompts[first:last]),
                list(responses[first:last]),
                truncation=True,
                max_length=min(tokenizer.model_max_length, 512),
                padding=True,
                return_tensors="pt",
            )
            logits = model(**batch).logits.float()
            scores += (logits[:, 0] if column is None else logits.log_softmax(dim=-1)[:, column]).tolist()
        return scores

    return reward


def _label_column(config: Any, label: str) -> int | None:
    """None for a model with a single output."""
    if config.num_labels == 1:
        return None
    names = {str(name): index for index, name in config.id2label.items()}
    if not label:
        return config.num_labels - 1
    if label in names:
        return int(names[label])
    if label.isdigit() and int(label) < config.num_labels:
        return int(label)
    raise RewardError(f"reward: the classifier has no label {label!r}; it has {', '.join(names)}")


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RewardError(f"reward: needs {name.partition('.')[0]}; run `pip install recontrol[train]`") from error


def _has_words(text: str) -> bool:
    return any(character.isalpha() for character in text)
