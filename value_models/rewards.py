"""Rewards: what a head is trained to predict. A reward is a pure batch function of prompts and responses.

Built-in ones run offline. `hf:<folder or hub id>` scores with a sequence-classification model, `module:function` with
the user's own callable. Knows nothing of heads or training. Enter at `load_reward`; to add one, write a function and
put it in REWARDS.
"""

# transformers leaves types out of `from_pretrained`.
# pyright: reportUnknownMemberType=false
from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from value_models.embeddings import cosine
from value_models.errors import RewardError
from value_models.packages import library

Reward = Callable[[Sequence[str], Sequence[str]], list[float]]
_HF_BATCH = 16
_HF_MAX_TOKENS = 512


def positive(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """VADER's compound sentiment, -1 to 1 (Hutto and Gilbert 2014)."""
    del prompts
    analyser = library("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
    return [analyser.polarity_scores(response)["compound"] for response in responses]


def plain(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Flesch reading ease within 0 to 100, over 100: short sentences and short words score high. No words: 0.5."""
    del prompts
    textstat = library("textstat")
    return [
        min(max(textstat.flesch_reading_ease(response), 0.0), 100.0) / 100.0 if _has_words(response) else 0.5
        for response in responses
    ]


def neutral(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Share of the text that VADER's lexicon finds neutral, 0 to 1. No words: 0.5."""
    del prompts
    analyser = library("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
    return [analyser.polarity_scores(response)["neu"] if _has_words(response) else 0.5 for response in responses]


def brevity(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Minus the number of words, over 50."""
    del prompts
    return [-len(response.split()) / 50.0 for response in responses]


def relevance(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Cosine of MiniLM's sentence embeddings of prompt and response, -1 to 1."""
    return cosine(prompts, responses)


def nontoxic(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """One minus the probability that a response is offensive, 0 to 1: a linear classifier of words (profanity-check).

    A response without words gets what the classifier says of none, about 0.96.
    """
    del prompts
    predict_prob = library("profanity_check").predict_prob
    # It cannot take an empty batch.
    return [1.0 - float(probability) for probability in predict_prob(list(responses))] if responses else []


REWARDS: dict[str, Reward] = {
    "positive": positive,
    "plain": plain,
    "neutral": neutral,
    "brevity": brevity,
    "relevance": relevance,
    "nontoxic": nontoxic,
}


def check_built_in(name: str, where: str) -> str:
    """The name of a reward that a file gave, which may only be built in: others are code, or models, of whoever wrote
    the file. Raises RewardError, which tells how to allow it."""
    if name not in REWARDS:
        raise RewardError(
            f"reward: {where} names {name!r}, which is not built in and is not loaded on a card's word; if you trust "
            "it, name it yourself with --reward"
        )
    return name


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
        if len(prompts) != len(responses):
            raise RewardError(f"reward {name!r}: {len(prompts)} prompts do not pair with {len(responses)} responses")
        returned = reward(prompts, responses)
        must = f"reward {name!r} must return one finite number for each of {len(responses)} responses"
        try:
            scores = [float(score) for score in returned]
        except (TypeError, ValueError) as error:
            raise RewardError(f"{must}: {error}") from error
        if len(scores) != len(responses) or not all(map(math.isfinite, scores)):
            raise RewardError(f"{must}: it returned {len(scores)}, {sum(map(math.isfinite, scores))} of them finite")
        return scores

    return checked


def _user_reward(name: str) -> Reward:
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise RewardError(f"reward: {name!r} cannot be imported: {error}") from error
    if not callable(function):
        raise RewardError(f"reward: {name!r} is not callable; it must take prompts and responses")
    return function  # type: ignore[return-value]


def _hugging_face_reward(source: str) -> Reward:
    """The logit of a one-label model, or the log-probability of a label (by name or index; the last by default).

    Prompt and response go in as a pair of texts, cut to what the model can read, 512 tokens at most.
    """
    folder, _, label = source.partition("#")
    tokenizer, model = _load_classifier(folder)
    column = _label_column(model.config, label)
    is_multi_label = model.config.problem_type == "multi_label_classification"
    positions = getattr(model.config, "max_position_embeddings", None) or _HF_MAX_TOKENS
    max_length = min(tokenizer.model_max_length, positions, _HF_MAX_TOKENS)

    @torch.inference_mode()
    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        scores: list[float] = []
        for first in range(0, len(responses), _HF_BATCH):
            last = first + _HF_BATCH
            batch = tokenizer(
                list(prompts[first:last]),
                list(responses[first:last]),
                truncation=True,
                max_length=max_length,
                padding=True,
                return_tensors="pt",
            )
            logits: Tensor = model(**batch).logits.float()
            if column is None:
                scores += map(float, logits[:, 0].unbind())
            else:
                log_probs: Tensor = functional.logsigmoid(logits) if is_multi_label else logits.log_softmax(dim=-1)
                scores += map(float, log_probs[:, column].unbind())
        return scores

    return reward


def _load_classifier(folder: str) -> tuple[Any, Any]:
    """Tokenizer and model, able to pad. Raises RewardError, also for a model whose classifier is not in the file."""
    try:
        tokenizer = cast(Any, AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
        loaded = cast(
            Any,
            AutoModelForSequenceClassification.from_pretrained(
                folder, trust_remote_code=False, use_safetensors=True, output_loading_info=True
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
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, model.eval()


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


def _has_words(text: str) -> bool:
    return any(character.isalpha() for character in text)
