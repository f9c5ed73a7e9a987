"""Rewards: what a head is trained to predict. A reward is a pure batch function of prompts and responses.

Built-in ones run offline. `hf:<folder or hub id>` scores with a sequence-classification model, `module:function` with
the user's own callable. Knows nothing of heads or training. Enter at `load_reward`; to add one, write a function and
put it in REWARDS.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

from value_models.embeddings import cosine
from value_models.errors import RewardError
from value_models.packages import library
from value_models.reward_models import PREFIX, load_reward_model

Reward = Callable[[Sequence[str], Sequence[str]], list[float]]


def positive(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """VADER's compound sentiment, -1 to 1 (Hutto and Gilbert 2014)."""
    del prompts
    analyser = _vader()
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
    analyser = _vader()
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


def is_read_by_a_model(name: str) -> bool:
    """Whether a reward, by its name, is a network that reads texts, which takes a hundred times what a function does.

    Of a user's own function nothing is known.
    """
    return name == "relevance" or name.startswith(PREFIX)


def check_built_in(name: str, where: str) -> str:
    """The name of a reward that a file gave, which may only be built in: others are code, or models, of whoever wrote
    the file. Raises RewardError, which tells how to allow it."""
    if name not in REWARDS:
        raise RewardError(
            f"reward: {where} names {name!r}, which is not built in and is not loaded on a card's word; if you trust "
            "it, name it yourself with --reward"
        )
    return name


def load_reward(name: str, *, device: str = "cpu", dtype: str = "auto") -> Reward:
    """A built-in reward, `hf:<folder or hub id>[#label]`, or `module:function`; its scores are checked.

    `device` and `dtype` are of a reward model; see reward_models.py. Raises RewardError, at once for an unknown name
    and on use for wrong scores.
    """
    if name in REWARDS:
        reward = REWARDS[name]
    elif name.startswith(PREFIX):
        reward = load_reward_model(name.removeprefix(PREFIX), device=device, dtype=dtype)
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
        try:
            returned = reward(prompts, responses)
        except SystemExit as error:
            raise RewardError(f"reward {name!r} ended the program, with {error.code!r}, in place of scores") from error
        must = f"reward {name!r} must return one finite number for each of {len(responses)} responses"
        try:
            scores = [float(score) for score in returned]
        except (TypeError, ValueError, OverflowError) as error:
            raise RewardError(f"{must}: {error}") from error
        if len(scores) != len(responses) or not all(map(math.isfinite, scores)):
            raise RewardError(f"{must}: it returned {len(scores)}, {sum(map(math.isfinite, scores))} of them finite")
        return scores

    return checked


def _user_reward(name: str) -> Reward:
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (Exception, SystemExit) as error:
        told = f"{type(error).__name__}: {error}"
        raise RewardError(f"reward: {name!r} cannot be imported: {told}") from error
    if not callable(function):
        raise RewardError(f"reward: {name!r} is not callable; it must take prompts and responses")
    return function  # type: ignore[return-value]


@functools.cache
def _vader() -> Any:
    """It reads its lexicon once, and a search asks for few scores at a time."""
    return library("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()


def _has_words(text: str) -> bool:
    return any(character.isalpha() for character in text)
