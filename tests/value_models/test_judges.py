"""What the judges count, and what they must not be fooled by."""

import pytest

from value_models.metrics import (
    MetricError,
    bootstrap_interval,
    dale_chall_easy,
    diversity,
    num_sentences,
    word_frequency,
)


def test_repeating_a_difficult_word_does_not_make_a_text_easier() -> None:
    once = dale_chall_easy("The epistemological cat")
    assert once == pytest.approx(2 / 3)
    assert dale_chall_easy("The epistemological cat " * 10) == pytest.approx(once)
    assert dale_chall_easy("epistemological " * 10) == 0.0


@pytest.mark.parametrize("judge", [dale_chall_easy, word_frequency])
def test_quotation_marks_are_no_words(judge: object) -> None:
    assert callable(judge)
    assert judge("' the 'big' dog '") == judge("the big dog")


def test_diversity_is_the_product_of_the_shares_of_distinct_n_grams() -> None:
    # a b a b a: bigrams 2 of 4, trigrams 2 of 3, 4-grams 2 of 2.
    assert diversity("a b a b a") == pytest.approx(2 / 4 * 2 / 3)
    assert diversity("every word here is new") == 1.0
    assert diversity("again " * 100) < 0.001


@pytest.mark.parametrize(
    ("text", "count"), [("", 0), ("One", 1), ("One. Two! Three?", 3), ("3.5 is a number.", 1), ("Wait... What", 2)]
)
def test_sentences_are_counted_by_their_ends(text: str, count: int) -> None:
    assert num_sentences(text) == count


def test_an_interval_of_nothing_is_refused() -> None:
    with pytest.raises(MetricError, match="at least one value"):
        bootstrap_interval([])


def test_an_interval_of_equal_paired_differences_is_a_point() -> None:
    first, second = [0.25, 1.25, 2.25], [0.0, 1.0, 2.0]
    assert bootstrap_interval([a - b for a, b in zip(first, second, strict=True)]) == (0.25, 0.25)


def test_more_confidence_is_a_wider_interval() -> None:
    values = [0.0, 1.0, 4.0, 9.0] * 5
    (low, high), (low_99, high_99) = bootstrap_interval(values), bootstrap_interval(values, confidence=0.99)
    assert low_99 < low < high < high_99
