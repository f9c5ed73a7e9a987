"""Judges and text statistics for evaluation: pure batch functions of prompts and responses, as rewards are.

Higher is better for what a judge judges, by other means than the reward it judges; `coherence` alone is what the reward
`relevance` is, and judges other heads only. Knows nothing of heads, rewards or engines. Enter at EVAL_METRICS; to add
one, write a function and put it there, `_each(function)` where it looks at one response at a time.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from value_models.anchors import ANCHORED
from value_models.embeddings import cosine, static_cosine
from value_models.errors import MetricError
from value_models.packages import library

EvalMetric = Callable[[Sequence[str], Sequence[str]], list[float]]
_HOSTILE = ("aggression", "hate", "kill", "rage", "ridicule", "sexual", "swearing_terms", "violence")
"""Categories of Empath."""
_ORDINARY_ZIPF = 5.5
"""Words at least this frequent (about one in 3,000) say little of what a text is about."""
_WORD = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)*")


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
    return 1.0 - library("textblob").TextBlob(text).sentiment.subjectivity


def textblob_polarity(text: str) -> float:
    """Polarity of Pattern's lexicon, -1 to 1."""
    return library("textblob").TextBlob(text).sentiment.polarity


def word_frequency(text: str) -> float:
    """Mean Zipf frequency of the words (wordfreq): common words score high. Numbers and names count as they are."""
    zipf_frequency = library("wordfreq").zipf_frequency
    words = _WORD.findall(text)
    return sum(zipf_frequency(word, "en") for word in words) / max(len(words), 1)


def dale_chall_easy(text: str) -> float:
    """Share of words on the easy list of Dale and Chall (1948) or of one syllable. One for a text without words.

    Word by word: textstat's own count takes each difficult word once, so that repeating it would look easier.
    """
    is_difficult = library("textstat").is_difficult_word
    words = _WORD.findall(text)
    return 1.0 - sum(map(is_difficult, words)) / len(words) if words else 1.0


def clean_words(text: str) -> float:
    """Minus the share of words on better-profanity's list, whole words in any case. Zero for a text without words.

    Its entries of several words, and spellings with digits or symbols, are not looked for. The list is wide: it has
    `god`, `fat` and `pot` too.
    """
    return 0.0 - _share_in(_profanities(), text)


def profane_spans(text: str) -> list[tuple[int, int]]:
    """Where words on that list begin and end in a text."""
    found = [(match.start(), match.end(), match.group().lower()) for match in _WORD.finditer(text)]
    return [(start, end) for start, end, word in found if word.removesuffix("'s") in _profanities()]


def empath_peaceful(text: str) -> float:
    """Minus the share of words in one or more of Empath's categories of hostility, swearing and sex (Fast et al. 2016).

    Zero for a text without words.
    """
    return 0.0 - _share_in(_hostile_words(), text)


def few_sentences(text: str) -> float:
    """Minus the sentences begun, counted by their ends and an unfinished last one."""
    return -float(len([part for part in re.split(r"[.!?]+(?:\s|$)", text) if part.strip()]))


def few_characters(text: str) -> float:
    """Minus the characters."""
    return -float(len(text))


def coherence(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Cosine of the sentence embeddings of prompt and response, RE-Control's measure (Kong et al. 2024), by MiniLM."""
    return cosine(prompts, responses)


def wordllama_similarity(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Cosine of the mean token vectors of prompt and response (WordLlama).

    A second opinion on `relevance` rather than an independent one: the vectors come from other language models, but
    were fitted to pairs of texts many of which MiniLM learned from too (NLI, MS MARCO, GooAQ, Quora).
    """
    return static_cosine(prompts, responses)


def prompt_word_recall(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Share of the prompt's content words that the response takes up, rare words counting for more.

    A word below Zipf frequency 5.5 weighs 8 less that frequency; words with one Porter stem are one word, the most
    frequent of them. Zero for a prompt without such words.
    """
    return [_recall(_content_stems(prompt), response) for prompt, response in zip(prompts, responses, strict=True)]


def _each(score: Callable[[str], float]) -> EvalMetric:
    """A metric that looks at one response at a time."""

    def metric(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        del prompts
        return [score(response) for response in responses]

    return metric


EVAL_METRICS: dict[str, EvalMetric] = {
    "diversity": _each(diversity),
    "afinn": _each(afinn),
    "afinn_calm": _each(afinn_calm),
    "textblob_objectivity": _each(textblob_objectivity),
    "textblob_polarity": _each(textblob_polarity),
    "word_frequency": _each(word_frequency),
    "dale_chall_easy": _each(dale_chall_easy),
    "clean_words": _each(clean_words),
    "empath_peaceful": _each(empath_peaceful),
    "coherence": coherence,
    "wordllama_similarity": wordllama_similarity,
    "prompt_word_recall": prompt_word_recall,
    "few_sentences": _each(few_sentences),
    "few_characters": _each(few_characters),
    **ANCHORED,
}


def load_metric(name: str) -> EvalMetric:
    """Raises MetricError with the known names; the metric raises it where its library is missing."""
    if name not in EVAL_METRICS:
        raise MetricError(f"metric: there is no metric {name!r}. Known: {', '.join(sorted(EVAL_METRICS))}")
    return EVAL_METRICS[name]


def _words(text: str) -> list[str]:
    """In lower case, without the possessive ending."""
    return [word.removesuffix("'s") for word in _WORD.findall(text.lower())]


def _share_in(lexicon: frozenset[str], text: str) -> float:
    words = _words(text)
    return sum(word in lexicon for word in words) / max(len(words), 1)


def _content_stems(text: str) -> dict[str, float]:
    """The weight of each content word of a text, by its stem."""
    zipf_frequency = library("wordfreq").zipf_frequency
    weights: dict[str, float] = {}
    for word in _words(text):
        zipf = zipf_frequency(word, "en")
        if zipf < _ORDINARY_ZIPF:
            stem = _stem(word)
            weights[stem] = min(8.0 - zipf, weights.get(stem, 8.0))
    return weights


def _recall(weights: dict[str, float], response: str) -> float:
    stems = set(map(_stem, _words(response)))
    return sum(weight for stem, weight in weights.items() if stem in stems) / (sum(weights.values()) or 1.0)


@functools.cache
def _afinn() -> Any:
    return library("afinn").Afinn()


@functools.cache
def _profanities() -> frozenset[str]:
    return frozenset(map(str, library("better_profanity").profanity.CENSOR_WORDSET))


@functools.cache
def _hostile_words() -> frozenset[str]:
    categories = library("empath").Empath().cats
    return frozenset(word for category in _HOSTILE for word in categories[category])


@functools.lru_cache(maxsize=1 << 16)
def _stem(word: str) -> str:
    return _stemmer().stem(word)


@functools.cache
def _stemmer() -> Any:
    return library("nltk.stem.porter").PorterStemmer()
