"""Judges and text statistics for evaluation, none of which a shipped head was trained on.

Each takes one response's text. Knows nothing of heads, rewards or engines. Enter at EVAL_METRICS; to add one, write a
function and put it there.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_WORD = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)*")


class MetricError(ValueError):
    """A metric that is unknown, whose library is missing, or that has nothing to measure."""


def diversity(text: str) -> float:
    """Product over n = 2..4 of the share of distinct n-grams of words (Khanov et al. 2024). One for a short text."""
    words = text.lower().split()
    product = 1.0
    for n in range(2, 5):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        if grams:
            product *= len(set(grams)) / len(grams)
    return product


def afinn(text: str) -> float:
    """AFINN sentiment score a word (Nielsen 2011)."""
    return _afinn().score(text) / max(len(text.split()), 1)


def afinn_calm(text: str) -> float:
    """Minus the AFINN valence a word, whatever its sign: text without emotional words scores zero, the highest."""
    scores = [abs(score) for score in _afinn().scores(text)]
    return -sum(scores) / max(len(text.split()), 1)


def textblob_objectivity(text: str) -> float:
    """One minus the subjectivity of Pattern's lexicon, 0 to 1."""
    return 1.0 - _library("textblob").TextBlob(text).sentiment.subjectivity


def textblob_polarity(text: str) -> float:
    """Polarity of Pattern's lexicon, -1 to 1."""
    return _library("textblob").TextBlob(text).sentiment.polarity


def word_frequency(text: str) -> float:
    """Mean Zipf frequency of the words (wordfreq): common words score high. Numbers and names count as they are."""
    zipf_frequency = _library("wordfreq").zipf_frequency
    words = _WORD.findall(text)
    return sum(zipf_frequency(word, "en") for word in words) / max(len(words), 1)


def dale_chall_easy(text: str) -> float:
    """Share of words on the easy list of Dale and Chall (1948) or of one syllable. One for a text without words.

    Word by word: textstat's own count takes each difficult word once, so that repeating it would look easier.
    """
    is_difficult = _library("textstat").is_difficult_word
    words = _WORD.findall(text)
    return 1.0 - sum(map(is_difficult, words)) / len(words) if words else 1.0


def num_sentences(text: str) -> float:
    """Sentences begun, counted by their ends and an unfinished last one."""
    return float(len([part for part in re.split(r"[.!?]+(?:\s|$)", text) if part.strip()]))


def num_characters(text: str) -> float:
    return float(len(text))


EVAL_METRICS: dict[str, Callable[[str], float]] = {
    "diversity": diversity,
    "afinn": afinn,
    "afinn_calm": afinn_calm,
    "textblob_objectivity": textblob_objectivity,
    "textblob_polarity": textblob_polarity,
    "word_frequency": word_frequency,
    "dale_chall_easy": dale_chall_easy,
    "num_sentences": num_sentences,
    "num_characters": num_characters,
}


def load_metric(name: str) -> Callable[[str], float]:
    """Raises MetricError with the known names."""
    if name not in EVAL_METRICS:
        raise MetricError(f"metric: there is no metric {name!r}. Known: {', '.join(sorted(EVAL_METRICS))}")
    return EVAL_METRICS[name]


def bootstrap_interval(
    values: Sequence[float], *, num_resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean. Pass one value a prompt: responses to one prompt are not independent.

    For a paired comparison pass the differences. Raises MetricError without values.
    """
    data = np.asarray(values, dtype=float)
    if not len(data):
        raise MetricError("an interval needs at least one value")
    rows = np.random.default_rng(seed).integers(0, len(data), (num_resamples, len(data)))
    low, high = np.quantile(data[rows].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


@functools.cache
def _afinn() -> Any:
    return _library("afinn").Afinn()


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MetricError(f"metric: needs {name.partition('.')[0]}; run `pip install recontrol[train]`") from error
