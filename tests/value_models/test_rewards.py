import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from tests.conftest import byte_tokenizer
from value_models.errors import MetricError, RewardError
from value_models.metrics import EVAL_METRICS, load_metric
from value_models.rewards import REWARDS, load_reward

SCORES = {**REWARDS, **EVAL_METRICS}
GOOD, BAD = "What a wonderful, happy day! I love it.", "This is terrible. I hate this awful mess."
RUDE = "You stupid idiot, I hate you and I will kill you, you piece of shit."
EASY = "The cat sat on the mat. It was a big cat."
HARD = "Epistemological considerations necessitate methodological circumspection notwithstanding idiosyncrasies."


@pytest.mark.parametrize(
    ("name", "better", "worse"),
    [
        ("positive", GOOD, BAD),
        ("plain", EASY, HARD),
        ("neutral", "It is made of steel.", GOOD),
        ("brevity", "Yes.", HARD * 5),
        ("nontoxic", GOOD, RUDE),
    ],
)
def test_a_built_in_reward_prefers_what_it_is_named_for(name: str, better: str, worse: str) -> None:
    high, low, empty = load_reward(name)(["", "", ""], [better, worse, ""])
    assert high > low
    assert isinstance(empty, float)


@pytest.mark.parametrize(
    ("name", "better", "worse"),
    [
        ("afinn", GOOD, BAD),
        ("textblob_polarity", GOOD, BAD),
        ("afinn_calm", EASY, BAD),
        ("textblob_objectivity", EASY, GOOD),
        ("word_frequency", EASY, HARD),
        ("dale_chall_easy", EASY, HARD),
        ("clean_words", BAD, RUDE),
        ("empath_peaceful", GOOD, RUDE),
        ("diversity", EASY, "a b c d " * 9),
        ("few_sentences", HARD, EASY),
        ("few_characters", EASY, HARD),
        ("anchors_positive", GOOD, BAD),
        ("anchors_plain", EASY, HARD),
        ("anchors_neutral", "The tower has two doors.", GOOD),
        ("anchors_nontoxic", GOOD, RUDE),
    ],
)
def test_a_judge_ranks_an_obvious_pair(name: str, better: str, worse: str) -> None:
    high, low, empty = load_metric(name)(["", "", ""], [better, worse, ""])
    assert high > low
    assert isinstance(empty, float)


@pytest.mark.parametrize("name", ["relevance", "coherence", "wordllama_similarity", "prompt_word_recall"])
def test_an_answer_on_the_topic_scores_above_one_off_it(name: str) -> None:
    prompts = ["How do I bake bread at home?", "Which train goes to the harbour?"]
    answers = ["Knead the dough, let it rise, and bake the bread in a hot oven.", "The train to the harbour is line 4."]
    on_topic, off_topic = SCORES[name](prompts, answers), SCORES[name](prompts, answers[::-1])
    assert all(on > off for on, off in zip(on_topic, off_topic, strict=True))


@pytest.mark.parametrize("name", SCORES)
def test_a_batch_gives_each_response_what_it_gets_alone(name: str) -> None:
    score = SCORES[name]
    prompts, responses = [EASY, GOOD, "", BAD], [GOOD, "", HARD, RUDE]
    alone = [score([prompt], [response])[0] for prompt, response in zip(prompts, responses, strict=True)]
    assert score(prompts, responses) == pytest.approx(alone, abs=1e-5)
    assert score([], []) == []


def test_every_metric_and_reward_is_covered_above() -> None:
    judges = {"afinn", "afinn_calm", "textblob_objectivity", "textblob_polarity", "word_frequency", "dale_chall_easy",
              "clean_words", "empath_peaceful", "wordllama_similarity", "prompt_word_recall"}  # fmt: skip
    judges |= {"anchors_positive", "anchors_plain", "anchors_neutral", "anchors_nontoxic"}
    assert set(EVAL_METRICS) == judges | {"diversity", "coherence", "few_sentences", "few_characters"}
    assert set(REWARDS) == {"positive", "plain", "neutral", "brevity", "relevance", "nontoxic"}


def test_coherence_is_the_measure_that_relevance_rewards() -> None:
    pairs = [EASY, GOOD], ["A big cat sat there.", HARD]
    assert load_metric("coherence")(*pairs) == load_reward("relevance")(*pairs)


def test_nontoxic_is_a_share_of_one_for_any_text() -> None:
    scores = load_reward("nontoxic")([""] * 5, [RUDE, GOOD, "", "...", "\u4e16\u754c"])
    assert all(0 <= score <= 1 for score in scores)
    assert scores[0] < 0.01 < 0.9 < scores[1]
    assert scores[2] == scores[3] > 0.9


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(RewardError, match="brevity, neutral, nontoxic, plain, positive, relevance"):
        load_reward("nope")
    with pytest.raises(MetricError, match="afinn"):
        load_metric("nope")


def test_a_users_function_is_a_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def vowels(prompts, responses):\n    return [sum(c in 'aeiou' for c in r) for r in responses]\n"
        "def short(prompts, responses):\n    return [0.0]\n"
        "def nan(prompts, responses):\n    return [float('nan')] * len(responses)\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_reward("my_rewards:vowels")(["", ""], ["aha", "zzz"]) == [2.0, 0.0]
    for name in ("short", "nan"):
        with pytest.raises(RewardError, match="one finite number for each of 2"):
            load_reward(f"my_rewards:{name}")(["", ""], ["a", "b"])
    for name in ("my_rewards:missing", "no_such_module:f", "my_rewards:number"):
        with pytest.raises(RewardError):
            load_reward(name)


@pytest.mark.parametrize("num_labels", [1, 3])
def test_a_sequence_classification_model_is_a_reward(tmp_path: Path, num_labels: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                         vocab_size=258, num_labels=num_labels, pad_token_id=None)  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    reward = load_reward(f"hf:{tmp_path}")
    prompts, responses = ["hi"] * 20, [f"answer {i}" * (i + 1) for i in range(20)]
    scores = reward(prompts, responses)
    assert len(scores) == 20
    assert reward(prompts[:1], responses[:1]) == pytest.approx(scores[:1], abs=1e-4)
    if num_labels == 3:
        assert all(score <= 0 for score in scores)
        named = load_reward(f"hf:{tmp_path}#LABEL_2")(prompts, responses)
        assert named == pytest.approx(scores)
        with pytest.raises(RewardError, match="LABEL_0"):
            load_reward(f"hf:{tmp_path}#nope")


def test_a_classifier_that_cannot_be_loaded_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(RewardError, match="cannot load"):
        load_reward(f"hf:{tmp_path}")
