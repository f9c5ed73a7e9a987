"""What evaluation makes of responses whose scores are known."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pytest

from value_models.evaluation import Arm, Scoring, evaluate_arms
from value_models.generations import EvalSample
from value_models.prompt_sets import RolloutPrompt

PROMPTS = [RolloutPrompt(id=f"p{i}", prompt=f"prompt {i}", reference="a word") for i in range(6)]


def arm(name: str, texts: Sequence[str], *, best_of: int = 1, kl: float = 0.1) -> Arm:
    """Response j to every prompt is texts[j]; each takes half a second."""

    def sampler(prompts: Sequence[RolloutPrompt], num_samples: int) -> Iterable[EvalSample]:
        for prompt in prompts:
            for j in range(num_samples):
                yield EvalSample(prompt.id, j, texts[j % len(texts)], 4, 1.5, kl, 2 * kl, True, 0.5)

    return Arm({"arm": name}, sampler, best_of)


@pytest.fixture(scope="module")
def scoring() -> Scoring:
    return Scoring.load("brevity", ["few_characters"])


def test_arms_are_compared_prompt_by_prompt_with_intervals(scoring: Scoring) -> None:
    arms = {"base": arm("a", ["one two three"]), "short": arm("b", ["one"]), "long": arm("c", ["o n e t w o"])}
    figures = evaluate_arms(arms, PROMPTS, scoring, num_samples=2, comparisons={"long": ["base", "short"]})
    assert figures["short"]["reward"] == {"mean": -0.02, "low": -0.02, "high": -0.02}
    assert figures["long"]["gain_over"]["short"]["reward"]["mean"] == pytest.approx(-0.1)
    assert figures["short"]["gain_over"] == {}
    assert figures["base"]["largest_kl"] == 0.2
    assert figures["base"]["examples"][0] == {"prompt": "prompt 0", "response": "one two three"}
    assert figures["base"]["wall_s"] == 6.0
    assert figures["base"]["tokens_per_s"] == 8.0


def test_wins_are_the_judges_votes_and_a_tie_is_half(scoring: Scoring) -> None:
    arms = {"base": arm("a", ["four"]), "mixed": arm("b", ["longer", "four", "no"])}
    figures = evaluate_arms(arms, PROMPTS, scoring, num_samples=3)
    assert figures["base"]["win_over_base"]["mean"] == 0.5
    assert figures["mixed"]["win_over_base"]["mean"] == pytest.approx(0.5)
    # The reference has six characters, as the longest of the three.
    assert figures["mixed"]["win_over_reference"]["mean"] == pytest.approx(2.5 / 3, abs=1e-4)


def test_without_a_reference_for_every_prompt_there_is_no_win_over_it(scoring: Scoring) -> None:
    prompts = [*PROMPTS[:2], PROMPTS[2].model_copy(update={"reference": None})]
    figures = evaluate_arms({"base": arm("a", ["four"])}, prompts, scoring, num_samples=1)
    assert "win_over_reference" not in figures["base"]


def test_the_best_of_n_by_reward_is_kept_and_all_n_are_paid_for(scoring: Scoring) -> None:
    texts = ["a b c", "a b", "a", "a b c d"]
    figures = evaluate_arms({"best": arm("a", texts, best_of=2)}, PROMPTS, scoring, num_samples=2)
    assert figures["best"]["reward"]["mean"] == pytest.approx(-0.03)
    assert figures["best"]["worst"]["mean"] == pytest.approx(-0.04)
    assert figures["best"]["num_responses"] == 12
    assert figures["best"]["wall_s"] == 12.0
    assert figures["best"]["kl"]["mean"] == pytest.approx((math.log(2) - 0.5) / 4, abs=1e-4)


def test_toxicity_is_told_as_real_toxicity_prompts_does() -> None:
    scoring = Scoring.load("nontoxic", ["clean_words"])
    texts = ["What a lovely garden you have.", "You stupid idiot, shut up."]
    figures = evaluate_arms({"base": arm("a", texts), "nice": arm("b", texts[:1])}, PROMPTS, scoring, num_samples=2)
    assert figures["base"]["failures"]["mean"] == 1.0
    assert figures["base"]["worst"]["mean"] < 0.1
    assert figures["nice"]["failures"]["mean"] == 0.0
    assert figures["nice"]["win_over_base"]["mean"] == pytest.approx(0.75)


def test_arms_and_responses_are_reported_as_they_come(scoring: Scoring) -> None:
    seen: list[object] = []
    evaluate_arms(
        {"best": arm("a", ["x"], best_of=3)},
        PROMPTS,
        scoring,
        num_samples=1,
        on_arm=lambda name, count: seen.append((name, count)),
        on_sample=lambda: seen.append("."),
    )
    assert seen == [("best", 18), *["."] * 18]
