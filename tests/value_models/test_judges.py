"""What the judges count, and what they must not be fooled by."""

import pytest

from value_models.metrics import (
    clean_words,
    dale_chall_easy,
    diversity,
    empath_peaceful,
    few_sentences,
    prompt_word_recall,
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


def test_bad_words_are_counted_whole_and_in_any_case() -> None:
    assert clean_words("Shit happens, SHIT's bad") == -0.5
    assert clean_words("Scunthorpe has a classic assessment of cocktails") == 0.0
    assert str(clean_words("fine")) == str(clean_words("")) == "0.0"


def test_a_word_of_several_hostile_categories_counts_once() -> None:
    # Empath has `kill` under aggression, hate, kill and violence.
    assert empath_peaceful("Kill the big process") == -0.25
    assert empath_peaceful("the cat sat") == empath_peaceful("") == 0.0


def test_recall_weighs_a_rare_word_more_and_ignores_ordinary_ones() -> None:
    prompt = "the people want sourdough bread"
    rare, common, both, none = prompt_word_recall(
        [prompt] * 4, ["Sourdough!", "bread", "Bread, sourdough", "the people want"]
    )
    assert both == pytest.approx(1.0)
    assert 0.5 < rare < 1.0
    assert common == pytest.approx(1 - rare)
    assert none == 0.0


def test_recall_takes_another_form_of_a_word_for_the_word() -> None:
    assert prompt_word_recall(["baking muffins"], ["The baker's muffin was baked"]) == pytest.approx([1.0])
    # One word in two forms weighs what its more frequent form does, so both prompts weigh it alike.
    once, twice = prompt_word_recall(["muffin sourdough", "muffin muffins sourdough"], ["muffins"] * 2)
    assert once == pytest.approx(twice)


def test_repeating_the_prompts_words_does_not_raise_recall() -> None:
    once, often = prompt_word_recall(["muffins and kayaks"] * 2, ["muffins", "muffins " * 30])
    assert once == often < 1.0


@pytest.mark.parametrize("prompt", ["", "...", "the of and to"])
def test_a_prompt_without_content_words_recalls_nothing(prompt: str) -> None:
    assert prompt_word_recall([prompt], ["the of and to muffins"]) == [0.0]


@pytest.mark.parametrize(
    ("text", "count"), [("", 0), ("One", 1), ("One. Two! Three?", 3), ("3.5 is a number.", 1), ("Wait... What", 2)]
)
def test_sentences_are_counted_by_their_ends(text: str, count: int) -> None:
    assert few_sentences(text) == -count
